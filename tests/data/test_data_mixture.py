import json
import math
from fractions import Fraction
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scale.data.mixture import ALGORITHMS, Mixture, QuotaWalk, preset_mixture, whole_shares
from ldm_scale.data.order import Order, OrderPreset

PERIOD = QuotaWalk.PERIOD
FEW = settings(max_examples=25, deadline=None)


@st.composite
def weights(draw: st.DrawFn) -> list[float]:
    return draw(st.lists(st.floats(0.05, 100), min_size=1, max_size=6))


@st.composite
def mixtures(draw: st.DrawFn, smallest: int = 1) -> Mixture:
    shares = draw(weights())
    orders = [
        Order(
            n=draw(st.integers(smallest, 3000)),
            seed=draw(st.integers(0, 2**40)),
            block=draw(st.integers(1, 40)),
            window=draw(st.integers(1, 8)),
            lanes=1,
        )
        for _ in shares
    ]
    return Mixture(orders, shares, seed=draw(st.integers(0, 2**40)))


@FEW
@given(mixtures(smallest=400), st.integers(0, 3))
def test_every_source_is_read_exactly_once_in_each_of_its_epochs(mixture, period):
    """A stretch of the stream holds a stretch of every source's own stream, without a gap."""
    begin, end = period * PERIOD + 12_000, (period + 1) * PERIOD + 4000
    source, sample = mixture(np.arange(begin, end))
    before, after = mixture.counts(begin), mixture.counts(end)
    for number, order in enumerate(mixture.orders):
        own = sample[source == number]
        np.testing.assert_array_equal(own, order(np.arange(before[number], after[number])))
        first = -(-before[number] // order.n) * order.n - before[number]  # where the next whole epoch begins
        for i in range(first, len(own) - order.n + 1, order.n):
            np.testing.assert_array_equal(np.sort(own[i : i + order.n]), np.arange(order.n))


@FEW
@given(weights(), st.integers(0, 2**40))
def test_counts_stay_within_one_of_the_shares_at_every_position(asked, seed):
    """And within 1 + p / 2^14 of the weights asked for, since a period holds whole numbers."""
    schedule = QuotaWalk(asked, seed)
    source, own = schedule(np.arange(2 * PERIOD))
    p = np.arange(1, 2 * PERIOD + 1)
    for number, share in enumerate(schedule.shares_S.tolist()):
        read = np.cumsum(source == number)
        assert np.abs(read * PERIOD - share * p).max() <= PERIOD
        assert read[PERIOD - 1] == share and read[-1] == 2 * share
        assert np.abs(read - p * (asked[number] / math.fsum(asked))).max() <= 1 + 2
        np.testing.assert_array_equal(own[source == number], np.arange(2 * share))
    assert schedule.counts(20_000).tolist() == np.bincount(source[:20_000], minlength=len(asked)).tolist()


@FEW
@given(mixtures(), st.integers(0, 10**13), st.lists(st.integers(0, 50_000), min_size=1, max_size=50))
def test_a_position_means_the_same_alone_and_in_any_company(mixture, start, offsets):
    """So every world delivers the same global batches, and a stream goes on from anywhere."""
    positions = start + np.array(offsets)
    source, sample = mixture(positions)
    alone = [tuple(int(value[0]) for value in mixture(np.array([p]))) for p in positions]
    assert list(zip(source.tolist(), sample.tolist(), strict=True)) == alone


@FEW
@given(mixtures(), st.integers(1, 8), st.integers(1, 6), st.integers(0, 10**9))
def test_every_world_reads_the_same_global_batches_from_any_position(mixture, world, per_rank, start):
    batch = world * per_rank
    stream = start + np.arange(5 * batch).reshape(5, batch)
    whole = np.stack(mixture(stream.ravel()), axis=-1).reshape(5, batch, 2)
    for rank in range(world):
        mine = np.stack(mixture(stream[:, rank::world].ravel()), axis=-1).reshape(5, per_rank, 2)
        np.testing.assert_array_equal(mine, whole[:, rank::world])


@FEW
@given(mixtures(), st.integers(0, 10**12))
def test_the_inverse_is_its_inverse(mixture, start):
    positions = np.arange(start, start + 200)
    source, sample = mixture(positions)
    before = mixture.counts(start)
    for number, order in enumerate(mixture.orders):
        here = source == number
        epochs = (before[number] + np.arange(here.sum())) // order.n
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            found = mixture.inverse(number, sample[here][now], epoch)
            np.testing.assert_array_equal(found, positions[here][now])


def test_weights_are_realised_and_fall_to_all_ranks_alike():
    mixture = preset_mixture(OrderPreset.random_access, sizes=[10_000, 500, 70], weights=[5, 3, 2], seed=4)
    source, _ = mixture(np.arange(4 * PERIOD))
    np.testing.assert_allclose(np.bincount(source) / len(source), [0.5, 0.3, 0.2], atol=1 / PERIOD)
    for world in (2, 4, 10):
        for rank in range(world):
            share = (source[rank::world] == 0).mean()
            assert abs(share - 0.5) < 0.03, f"rank {rank} of {world} reads {share:.3f} of source 0"


def test_seeds_differ_and_sources_of_one_size_are_not_read_in_step():
    one, other = (preset_mixture(OrderPreset.window, sizes=[900, 900], weights=[1, 1], seed=seed) for seed in (0, 1))
    positions = np.arange(1000)
    assert (one(positions)[0] == other(positions)[0]).mean() < 0.7
    assert (one.orders[0](positions) == one.orders[1](positions)).mean() < 0.02


def test_shares_are_the_largest_remainders_and_exact():
    assert whole_shares([1, 1, 1], 16) == [6, 5, 5]
    assert whole_shares([0.1, 0.2, 0.7], 10) == [1, 2, 7]
    assert whole_shares([1e300, 1e300], 4) == [2, 2]
    assert whole_shares([3.0], PERIOD) == [PERIOD]


@given(st.lists(st.floats(0.1, 50), min_size=1, max_size=20))
def test_shares_sum_up_and_are_less_than_one_off(asked):
    shares = whole_shares(asked, PERIOD)
    total = sum(map(Fraction, asked))
    assert sum(shares) == PERIOD
    assert all(abs(share - Fraction(w) * PERIOD / total) < 1 for share, w in zip(shares, asked, strict=True))


@pytest.mark.parametrize(
    "wrong, told",
    [
        ([], "no sources"),
        ([1, 0], "weight 0 of source 1; must be positive"),
        ([1, -2.5], "weight -2.5 of source 1"),
        ([math.nan, 1], "weight nan of source 0"),
        ([1, 1e-6], r"weight 1e-06 of source 1 is less than one read in 16384"),
    ],
)
def test_impossible_weights_are_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        QuotaWalk(wrong, 0)


def test_impossible_mixtures_are_refused():
    with pytest.raises(ValueError, match="1 sources with 2 weights"):
        Mixture([Order(n=3, seed=0)], [1, 2], seed=0)
    with pytest.raises(ValueError, match="start at 0"):
        Mixture([Order(n=3, seed=0)], [1], seed=0)(np.array([-1]))


def test_golden_vectors():
    """Pinned: a change here changes what every checkpoint's position means. Add an algorithm instead."""
    orders = [Order(n=5, seed=1, block=2, window=2, lanes=1), Order(n=3, seed=2, block=2, window=2, lanes=1)]
    source, sample = Mixture(orders, [3, 1], seed=7, algorithm="quota-walk/1")(np.arange(24))
    assert source.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert sample.tolist() == [2, 2, 1, 0, 0, 3, 4, 0, 2, 1, 4, 3, 1, 0, 4, 0, 2, 1, 3, 2, 4, 3, 2, 1]
    assert list(ALGORITHMS) == ["quota-walk/1"]


def test_golden_vectors_at_scale():
    sizes = [407_332_084, 2_170_337_258, 1000]
    mixture = preset_mixture(OrderPreset.window, sizes=sizes, weights=[0.7, 0.2, 0.1], seed=1)
    source, sample = mixture(np.array([0, 3, 7, 16_384, 16_387, 407_332_083, 10**12, 10**12 + 3, 10**12 + 7]))
    assert source.tolist() == [0, 1, 2, 0, 1, 0, 0, 0, 0]
    assert sample.tolist() == [
        302400149,
        234627317,
        787,
        164311551,
        453713046,
        404345201,
        37780080,
        148069191,
        254539365,
    ]
    assert mixture.counts(10**12) == [700012207031, 200012207032, 99975585937]
    everything = np.stack(mixture(np.arange(3 * PERIOD)))
    assert sha256(everything.astype("<i8").tobytes()).hexdigest()[:16] == "49b17e136944896f"
    assert [order.seed for order in mixture.orders] == [5677372035437057079, 2492902483993645819, 894064156239995505]


def test_state_makes_the_same_mixture_and_another_is_refused():
    mixture = preset_mixture(OrderPreset.window, sizes=[1000, 70], weights=[0.9, 0.1], seed=3)
    state = json.loads(json.dumps(mixture.state()))
    assert state.keys() == {"algorithm", "weights", "seed", "orders"}
    again, positions = Mixture.from_state(state), np.arange(50_000)
    np.testing.assert_array_equal(again(positions), mixture(positions))
    mixture.require_same(state)
    with pytest.raises(ValueError, match=r"weights was \[0\.8, 0\.2\], is now \[0\.9, 0\.1\]"):
        mixture.require_same(state | {"weights": [0.8, 0.2]})
    with pytest.raises(ValueError, match=r"was made by 'quota-walk/0'; this version knows 'quota-walk/1'"):
        Mixture.from_state(state | {"algorithm": "quota-walk/0"})
