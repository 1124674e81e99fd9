import hashlib
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from data_tools import remove, verify
from ldm_scale.core import storage
from ldm_scale.data.cache import CacheManifest, CacheShardWriter, LatentCache, fingerprint, finish_cache, finished_shard
from ldm_scale.data.captions import CaptionsConfig
from ldm_scale.data.config import DataConfig
from ldm_scale.data.shards import ShardSet
from ldm_scale.data.views import REMOVED
from ldm_scale.images.resize import ImageTransformConfig

COUNTS = (5, 7)
SHAPE = (2, 4, 4)
WHAT = {"transform": {"size": 8, "flip": False}, "kind": "point"}
PRINT = fingerprint(first_stage_kind="kl", first_stage_sha256="0", **WHAT)
GONE = "000010002"


def url(key: str) -> str:
    return f"https://example.org/{key}.jpg"


def moments(key: str) -> np.ndarray:
    return np.random.default_rng(int(key)).normal(size=SHAPE).astype(np.float16)


@pytest.fixture
def images(tmp_path, dataset, picture) -> Path:
    """Pictures with URL in json and parquet, and a member that no index knows."""
    shards = [
        [
            {
                "url": url(f"{shard:05d}{place:04d}"),
                "sha256": f"{shard}{place}" * 32,
                "image": picture(100 * shard + place),
                "text": f"a secret caption {shard}-{place}",
                "members": {"md5": f"extra secret {shard}-{place}".encode()},
            }
            for place in range(count)
        ]
        for shard, count in enumerate(COUNTS)
    ]
    ShardSet.open(str(dataset(tmp_path / "images", shards)))
    return tmp_path / "images"


@pytest.fixture
def latents(images, tmp_path) -> Path:
    """A cache of the pictures; one was rejected."""
    records = []
    for summary in ShardSet.open(str(images)).summaries:
        shard = int(summary.name[:5])
        with CacheShardWriter(tmp_path / "latents" / summary.name, fingerprint=PRINT, kind="point") as writer:
            for place in range(COUNTS[shard] - shard):
                key = f"{shard:05d}{place:04d}"
                writer.add(key, moments(key), f"a secret caption {shard}-{place}")
            records.append(writer.finish(source=summary.name, source_sha256=summary.sha256))
    finish_cache(tmp_path / "latents", records, first_stage={"kind": "kl", "config": {}, "sha256": "0"}, **WHAT)
    return tmp_path / "latents"


def take_down(*arguments: object) -> int:
    return remove.main([*map(str, arguments), "--reason", "ticket 17"])


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def secrets(picture, key: str = GONE) -> list[bytes]:
    """Bytes of a sample that must not be found anywhere."""
    shard, place = int(key[:5]), int(key[5:])
    return [
        picture(100 * shard + place)[100:160],
        f"secret caption {shard}-{place}".encode(),
        f"extra secret {shard}-{place}".encode(),
        url(key).encode(),
        moments(key).tobytes()[:24],
    ]


def leaks(folder: Path, wanted: list[bytes]) -> list[tuple[Path, bytes]]:
    return [(path, secret) for path, data in tree(folder).items() for secret in wanted if secret in data]


def stream(latents: Path):
    config = DataConfig(latents=str(latents), transform=ImageTransformConfig(size=8), max_bad_share=0)
    return config.latent_source(config.open_latents(), seed=1)


def test_no_byte_of_a_removed_sample_is_left_and_no_other_is_touched(images, latents, tmp_path, picture):
    assert len({secret for _, secret in leaks(tmp_path, secrets(picture))}) == 5
    before = {key: leaks(tmp_path, secrets(picture, key)) for key in ("000010001", "000010003", "000000002")}
    assert take_down(images, latents, "--url", url(GONE)) == 0
    assert leaks(tmp_path, secrets(picture)) == []
    assert {key: leaks(tmp_path, secrets(picture, key)) for key in before} == before
    for source in (images, latents):
        assert verify.main([str(source), "--level", "decode"]) == 0
        with tarfile.open(source / "00001.tar") as archive:
            assert archive.getmembers()


def test_other_readers_still_read_the_tars(images, latents):
    take_down(images, latents, "--key", GONE)
    samples = list(webdataset.WebDataset(str(latents / "00001.tar"), shardshuffle=False).decode())
    by_key = {sample["__key__"]: sample["npy"] for sample in samples}
    assert len(by_key) == 6 and not by_key[GONE].any()
    np.testing.assert_array_equal(by_key["000010003"], moments("000010003"))
    jsons = webdataset.WebDataset(str(images / "00001.tar"), shardshuffle=False).decode(only=["json"])
    assert {sample["__key__"]: sample["json"] for sample in jsons}[GONE] == {}
    rows = pq.read_table(images / "00001.parquet").to_pylist()
    assert rows[2] == {"key": GONE, "status": "success", "url": None, "sha256": None, "caption": None}
    assert rows[3]["url"] == url("000010003")


def test_a_live_run_goes_on_with_other_samples_in_place(images, latents):
    before = stream(latents)
    state, identity, whole = before.order.state(), before.order_id, before.read(np.arange(40))
    content = [CacheManifest.read_from(str(latents)).content_id, ShardSet.open(str(images)).content_id]
    take_down(images, latents, "--key", GONE)
    after = stream(latents)
    after.order.require_same(state)
    assert after.order_id == identity == CacheManifest.read_from(str(latents)).order_id
    batch = after.read(np.arange(40))
    assert GONE in whole.keys and GONE not in batch.keys
    assert [a for a, b in zip(whole.keys, batch.keys, strict=True) if a != b] == [GONE] * whole.keys.count(GONE)
    cache, shards = LatentCache.open(str(latents)), ShardSet.open(str(images))
    assert [cache.content_id, shards.content_id] == [
        CacheManifest.read_from(str(latents)).content_id,
        shards.content_id,
    ]
    assert {cache.content_id, shards.content_id}.isdisjoint(content)


def test_nothing_is_encoded_again(images, latents):
    take_down(images, latents, "--key", GONE, "000010006")
    for summary in ShardSet.open(str(images)).summaries:
        assert finished_shard(latents / summary.name, PRINT, summary.sha256) is not None


@pytest.mark.parametrize(
    "step", ["_overwrite_members", "empty_rows", "_index_again", "renew_manifests", "renew_records"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_whoever_was_killed_is_finished_by_the_next(images, latents, tmp_path, picture, monkeypatch, step, when):
    real = getattr(remove, step)

    def killed(*arguments):
        is_listed = (latents / ".ldm" / REMOVED).exists()
        if when == "after" or not is_listed:
            real(*arguments)
        if is_listed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remove, step, killed)
        with pytest.raises(KeyboardInterrupt):
            take_down(images, latents, "--url", url(GONE), "--url", url(GONE))
    assert GONE not in stream(latents).read(np.arange(60)).keys, "listed before anything else"
    take_down(images, latents, "--key", GONE)
    assert leaks(tmp_path, secrets(picture)) == []
    for source in (images, latents):
        assert verify.main([str(source), "--level", "hash"]) == 0
    assert finished_shard(latents / "00001.tar", PRINT, ShardSet.open(str(images)).summaries[1].sha256) is not None
    notes = [json.loads(line) for line in (images / ".ldm" / remove.LOG).read_text().splitlines()]
    assert [(note["shard"], note["key"], note["reason"]) for note in notes] == [("00001.tar", GONE, "ticket 17")]


def test_every_way_to_name_a_sample(images, latents, tmp_path, picture):
    stored = hashlib.sha256(picture(3)).hexdigest()
    asked = tmp_path / "asked.txt"
    place = json.dumps({"shard": "00000.tar", "key": "000000004", "reason": "", "time": ""})
    asked.write_text(f"{url('000000000')}\n{stored.upper()}\n000000001\n\n{place}\n")
    report = tmp_path / "report.json"
    assert take_down(images, latents, "--list", asked, "--sha256", "02" * 32, "--report", report) == 0
    found = storage.read_json(report)
    assert found["found"] == [f"00000.tar/00000000{i}" for i in range(5)]
    assert found["held_by"] == {str(images): 5, str(latents): 5} and found["overwritten"] == 10


def test_what_is_not_there_is_named(images, capsys):
    assert take_down(images, "--key", GONE, "nowhere") == 1
    assert "not found: nowhere" in capsys.readouterr().out
    assert take_down(images) == 2
    assert "nothing to take down" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(images, latents, tmp_path, capsys):
    before = tree(tmp_path)
    assert take_down(images, latents, "--url", url(GONE), "--dry-run") == 0
    assert tree(tmp_path) == before and f"00001.tar/{GONE}" in capsys.readouterr().out


def test_a_source_that_cannot_be_written_is_listed_elsewhere(images, tmp_path, capsys):
    index_dir = tmp_path / "index"
    for path in images.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    images.chmod(0o555)
    try:
        if not os.access(images / "00000.tar", os.W_OK):  # root may write all the same
            assert take_down(images, "--key", GONE, "--index-dir", index_dir) == 2
            assert "--list-only" in capsys.readouterr().err
        assert take_down(images, "--key", GONE, "--index-dir", index_dir, "--list-only") == 0
    finally:
        images.chmod(0o755)
    config = DataConfig(images=str(images), index_dir=str(index_dir), transform=ImageTransformConfig(size=8))
    batch = config.image_source(config.open_images(), seed=0).read(np.arange(36))
    assert GONE not in batch.keys and len(set(batch.keys)) == 11


def test_runs_say_which_checkpoints_have_seen_it(images, latents, tmp_path, capsys):
    source = stream(latents)
    keys = source.read(np.arange(11)).keys
    first = keys.index(GONE)
    run = tmp_path / "run"
    data = {"latents": str(latents), "images": None, "index_dir": None, "task": "text", "order": "random_access"}
    config = {"data": data, "unet": {}, "seed": 1, "global_batch": 1}
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config))
    for seen in (first, first + 1, first + 11 + 11):
        folder = run / "checkpoints" / f"images_{seen:012d}"
        folder.mkdir()
        state = {"images_seen": seen, "order_id": source.order_id, "order": source.order.state()}
        (folder / "complete.json").write_text(json.dumps({"state": state}))
    report = tmp_path / "report.json"
    take_down(images, latents, "--key", GONE, "--runs", run, tmp_path / "no run", "--report", report)
    said = storage.read_json(report)["runs"]
    counts = list(said[str(run)][0]["checkpoints"].values())
    assert counts[:2] == [0, 1] and counts[2] >= 2
    assert said[str(tmp_path / "no run")].startswith("cannot be told")
    assert f"00001.tar/{GONE} seen images_{first + 1:012d} 1 times" in capsys.readouterr().out


def test_caption_overlays_lose_the_row(images, tmp_path):
    file = tmp_path / "new" / "captions.parquet"
    file.parent.mkdir()
    pq.write_table(pa.table({"key": [GONE, "000010003"], "better": ["a better secret", "another"]}), file)
    config = CaptionsConfig(file=str(file), columns={"better": 1.0})
    assert config.open(None, 0)([GONE], ["own"], np.array([0])) == ["a better secret"]
    take_down(images, "--key", GONE, "--captions", file)
    assert leaks(tmp_path / "new", [b"a better secret"]) == []
    assert config.open(None, 0)([GONE, "000010003"], ["own", ""], np.array([0, 1])) == ["own", "another"]
