import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm_scale.data.captions import CaptionOverlay, CaptionsConfig

N = 4000
KEYS = [f"{i:06d}" for i in range(N)]
OWN = [f"own {i}" for i in range(N)]


def parquet(path: Path, **columns: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=700)
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Rows in another order than the samples; keys 000000 .. 000009 have none."""
    rows = np.random.default_rng(0).permutation(np.arange(10, N)).tolist()
    return parquet(
        tmp_path / "new.parquet",
        score=[0.5] * len(rows),
        key=[KEYS[i] for i in rows],
        short=[f"short {i}" for i in rows],
        long=[None if i % 2 else f" long {i} " for i in rows],
        txt=["never"] * len(rows),
    )


def overlay(file: str, columns: dict[str, float], seed: int = 0, index_dir: str | None = None) -> CaptionOverlay:
    opened = CaptionsConfig(file=file, columns=columns).open(index_dir, seed)
    assert opened is not None
    return opened


def test_every_key_finds_its_row(file):
    captions = overlay(file, {"short": 1.0})
    drawn = captions(KEYS, OWN, np.arange(N))
    assert drawn == OWN[:10] + [f"short {i}" for i in range(10, N)] and captions.missing == 10


def test_columns_are_drawn_by_weight(file):
    """Where a column says nothing, the others share its weight."""
    drawn = overlay(file, {"short": 1, "long": 2, "txt": 1})(KEYS[10:], OWN[10:], np.arange(10, N))
    assert all(caption.split()[1] == str(i) and caption == caption.strip() for i, caption in enumerate(drawn, 10))
    for odd, wanted in ((0, {"short": 0.25, "long": 0.5, "own": 0.25}), (1, {"short": 0.5, "own": 0.5})):
        counts = Counter(caption.split()[0] for caption in drawn[odd::2])
        assert counts.keys() == wanted.keys()
        for name, share in wanted.items():
            assert counts[name] / counts.total() == pytest.approx(share, abs=0.04)


def test_a_draw_depends_on_seed_and_position_only(file):
    columns = {"short": 1.0, "txt": 1.0}
    whole = overlay(file, columns)(KEYS, OWN, np.arange(N))
    some = np.array([3999, 17, 2500])
    again = overlay(file, columns)([KEYS[i] for i in some], [OWN[i] for i in some], some)
    assert again == [whole[i] for i in some]
    later = overlay(file, columns)(KEYS, OWN, np.arange(N) + N)
    assert later != whole != overlay(file, columns, seed=1)(KEYS, OWN, np.arange(N))


def test_the_layout_is_made_once(file, tmp_path):
    first = overlay(file, {"short": 1.0}).table
    made = first.folder / "captions.arrow"
    before = made.stat().st_mtime_ns
    assert overlay(file, {"long": 1.0}).table.folder == first.folder and made.stat().st_mtime_ns == before
    assert first.digest == hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert [path.name for path in tmp_path.glob(".ldm/*")] == [first.folder.name], "nothing half-made is left"
    parquet(Path(file), key=["000000"], short=["another"])
    assert overlay(file, {"short": 1.0})(KEYS[:2], OWN[:2], np.arange(2)) == ["another", "own 1"]


def test_a_layout_may_lie_elsewhere(file, tmp_path):
    captions = overlay(file, {"short": 1.0}, index_dir=str(tmp_path / "index"))
    assert captions.table.folder.is_relative_to(tmp_path / "index") and not (tmp_path / ".ldm").exists()
    assert captions(["000011"], ["x"], np.array([0])) == ["short 11"]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"key": ["a", "b", "a"], "short": ["1", "2", "3"]}, "two rows of key 'a'"),
        ({"key": ["a", None], "short": ["1", "2"]}, "1 rows without a key"),
        ({"name": ["a"], "short": ["1"]}, "rows of name, short; it needs a column key"),
        ({"key": ["a"], "score": [1.0]}, "needs a column key and one of captions"),
        ({"key": ["a"], "long": ["1"]}, r"captions\.columns\.short: .* has the columns long; txt stands"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        overlay(parquet(tmp_path / "bad.parquet", **columns), {"short": 1.0})
    assert not list(tmp_path.glob(".ldm/.*"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"captions\.file=.*none\.parquet is not there"):
        overlay(str(tmp_path / "none.parquet"), {"short": 1.0})
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cut\.parquet is no parquet file"):
        overlay(str(tmp_path / "cut.parquet"), {"short": 1.0})


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"file": "a"}, r"give both, a file and its columns"),
        ({"columns": {"a": 1.0}}, r"captions\.file=None with"),
        ({"file": "a", "columns": {"b": 0.0}}, r"captions\.columns\.b=0\.0; a weight above 0"),
    ],
)
def test_impossible_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CaptionsConfig(**wrong)
    assert CaptionsConfig().open(None, 0) is None
