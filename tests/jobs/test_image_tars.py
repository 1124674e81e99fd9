"""Image shards as a queue of tars, which several jobs may work through at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ldm_scale.data.shards import ShardWriter
from ldm_scale.jobs.image_tars import ImageTars

TARS = 100


def test_jobs_that_index_the_same_tars_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As two caches of two sizes, encoded side by side from shards that nobody has indexed."""
    for tar in range(TARS):
        with ShardWriter(tmp_path / "images" / f"{tar:03d}.tar") as writer:
            writer.add(f"{tar:03d}", {"png": b"not looked at", "txt": b"a caption"})
    jobs = [ImageTars(str(tmp_path / "images"), str(tmp_path / "index"), ("png",)) for _ in range(4)]

    def index_all(tars: ImageTars) -> int:
        return sum(tars.hold(tar, index_again=True).n for tar in range(TARS))

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(index_all, jobs)) == [TARS] * len(jobs)
    assert sorted(path.name for path in (tmp_path / "index").rglob("*") if path.is_file()) == [
        f"{tar:03d}.idx" for tar in range(TARS)
    ]
