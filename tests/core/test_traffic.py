"""What is counted of the network."""

import math
from concurrent.futures import ThreadPoolExecutor

from ldm_scale.core import traffic
from ldm_scale.core.traffic import Traffic


def test_threads_lose_no_count():
    began = traffic.so_far()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: traffic.count(read=3, fetched=2, retries=1), range(2000)))
    assert traffic.so_far().since(began) == Traffic(read=6000, fetched=4000, retries=2000)


def test_hits_are_the_share_that_was_not_fetched():
    assert Traffic(read=8, fetched=2).hits == 0.75
    assert Traffic(read=8, fetched=20).hits == 0, "what is announced ahead comes before it is read"
    assert math.isnan(Traffic(retries=1).hits)
