"""Streams of views and of mixtures, through the real loader."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_scale.data.cache import MIRRORED, CacheShardWriter, LatentCache, fingerprint, finish_cache, npy_header
from ldm_scale.data.captions import CaptionsConfig
from ldm_scale.data.config import DataConfig, MixedSourceConfig, Origin
from ldm_scale.data.loader import Loader
from ldm_scale.data.shards import ShardSet, ShardWriter
from ldm_scale.data.sources import MixedSource, SampleSource
from ldm_scale.data.views import REMOVED, write_selection
from ldm_scale.images.resize import Crop, ImageTransformConfig

SHAPE = (1, 2, 2)
TRANSFORM = ImageTransformConfig(size=8)


def write_latents(folder: Path, counts: Sequence[int], *, first: int = 0, mirrored: bool = False) -> LatentCache:
    """Latent i is all i, its mirror image all -i."""
    what = {"transform": {"size": 8, "flip": False}, "kind": "point"}
    printed = fingerprint(first_stage_kind="kl", first_stage_sha256="0", **what)
    records, begin = [], first
    for shard, count in enumerate(counts):
        with CacheShardWriter(folder / f"{shard}.tar", fingerprint=printed, kind="point") as writer:
            for i in range(begin, begin + count):
                flipped = npy_header(SHAPE) + np.full(SHAPE, -i, np.float16).tobytes()
                members = {MIRRORED: flipped} if mirrored else {}
                writer.add(f"{i:04d}", np.full(SHAPE, i), f"caption {i}", members=members)
            records.append(writer.finish(source="", source_sha256=""))
        begin += count
    finish_cache(folder, records, first_stage={"kind": "kl", "config": {}, "sha256": "0"}, **what)
    return LatentCache.open(str(folder))


def write_images(folder: Path, jpeg, count: int = 15) -> ShardSet:
    with ShardWriter(folder / "0.tar") as writer:
        for i in range(count):
            writer.add(f"{i:04d}", {"jpg": jpeg(i), "txt": f"caption {i}".encode()})
    return ShardSet.open(str(folder))


def latent_stream(config: DataConfig, seed: int, on_bad=None) -> SampleSource:
    return config.latent_source(config.open_latents(), seed, on_bad=on_bad)


def image_stream(config: DataConfig, seed: int) -> SampleSource:
    return config.image_source(config.open_images(), seed)


def take(source: SampleSource, *, start: int, count: int, batch: int = 12, world: int = 1) -> list[list[str]]:
    """Keys of some global batches, from all ranks, by position."""
    ranks = []
    for rank in range(world):
        loader = Loader(source, global_batch=batch, micro_batch=batch // world, rank=rank, world=world)
        with loader:
            batches = loader.batches(start)
            ranks.append([(b.positions.tolist(), b.keys) for b in (next(batches) for _ in range(count))])
    merged = []
    for parts in zip(*ranks, strict=True):
        keys = {p: key for positions, names in parts for p, key in zip(positions, names, strict=True)}
        merged.append([keys[p] for p in sorted(keys)])
    return merged


@pytest.fixture(scope="module")
def caches(tmp_path_factory) -> dict[str, str]:
    """Three caches of different keys, 23, 40 and 7 samples."""
    folder = tmp_path_factory.mktemp("caches")
    write_latents(folder / "a", (10, 13))
    write_latents(folder / "b", (40,), first=100)
    write_latents(folder / "c", (3, 4), first=200)
    return {name: str(folder / name) for name in "abc"}


def mixed(caches: dict[str, str], weights: dict[str, float], seed: int = 0) -> MixedSource:
    parts = {name: MixedSourceConfig(latents=caches[name], weight=weight) for name, weight in weights.items()}
    source = latent_stream(DataConfig(mixture=parts, transform=TRANSFORM), seed)
    assert isinstance(source, MixedSource)
    return source


WEIGHTS = st.dictionaries(st.sampled_from("abc"), st.floats(0.1, 10), min_size=1)


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.integers(0, 1000), st.sampled_from([2, 3, 4, 6]), st.integers(0, 500))
def test_a_mixture_is_one_stream_for_every_world(caches, weights, seed, world, start):
    source = mixed(caches, weights, seed)
    whole = take(source, start=start, count=8)
    assert take(source, start=start, count=8, world=world) == whole
    assert take(mixed(caches, weights, seed), start=start + 36, count=3, world=world) == whole[3:6], "resumed"


@settings(max_examples=15, deadline=None)
@given(WEIGHTS, st.integers(0, 1000))
def test_each_source_is_read_once_an_epoch_and_as_often_as_said(caches, weights, seed):
    source = mixed(caches, weights, seed)
    keys = [key for batch in take(source, start=0, count=40) for key in batch]
    for number, (name, part) in enumerate(source.sources.items()):
        own = [key for key in keys if key[1] == {"a": "0", "b": "1", "c": "2"}[name]]
        n = part.cache.n
        whole_epochs = len(own) // n * n
        assert set(Counter(own[:whole_epochs]).values()) <= {len(own) // n}
        assert all(sorted(own[e : e + n]) == sorted(own[:n]) for e in range(0, whole_epochs, n))
        counts = source.counts(len(keys))
        assert len(own) == source.mixture.counts(len(keys))[number] == counts[f"data/{name}/read"]
        assert counts[f"data/{name}/asked"] == pytest.approx(len(own), abs=1.1)
        assert counts[f"data/{name}/epoch"] == len(own) / n


def test_mixed_batches_hold_what_they_name(caches):
    source = mixed(caches, {"a": 0.5, "b": 0.3, "c": 0.2})
    batch = source.read(np.arange(100, 160))
    assert batch.moments[:, 0, 0, 0].tolist() == [int(key) for key in batch.keys]
    assert batch.captions == [f"caption {int(key)}" for key in batch.keys]
    assert len({key[1] for key in batch.keys}) == 3


def test_a_mixture_has_an_identity(caches):
    one = mixed(caches, {"a": 1, "b": 2})
    state = json.loads(json.dumps(one.order.state()))
    mixed(caches, {"b": 2, "a": 1}).order.require_same(state)
    with pytest.raises(ValueError, match=r"weights was \[1, 2\], is now \[1, 3\]"):
        mixed(caches, {"a": 1, "b": 3}).order.require_same(state)
    assert one.order_id == mixed(caches, {"b": 1, "a": 1}).order_id != mixed(caches, {"a": 1, "c": 2}).order_id


def test_sources_of_other_shapes_do_not_mix(caches, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SHAPE", (1, 3, 3))
    write_latents(tmp_path / "d", (4,))
    with pytest.raises(ValueError, match=r"data\.mixture joins samples of different shapes.*'d': \(1, 3, 3\)"):
        mixed({**caches, "d": str(tmp_path / "d")}, {"a": 1, "d": 1})


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(0, 22), min_size=1), st.integers(0, 200), st.sampled_from([1, 2, 3]))
def test_a_selected_stream_is_exactly_once_elastic_and_resumable(caches, tmp_path_factory, chosen, start, world):
    path = tmp_path_factory.mktemp("s") / "s.parquet"
    write_selection(path, [f"{int(i >= 10)}.tar" for i in chosen], [f"{i:04d}" for i in chosen], {})
    source = latent_stream(DataConfig(latents=caches["a"], selection=[str(path)], transform=TRANSFORM), seed=5)
    keys = [key for batch in take(source, start=0, count=2 * len(chosen)) for key in batch]
    for epoch in range(24):
        some = keys[epoch * len(chosen) : (epoch + 1) * len(chosen)]
        assert sorted(some) == sorted(f"{i:04d}" for i in chosen)
    assert take(source, start=start, count=4, world=world) == take(source, start=start, count=4)
    assert take(source, start=start + 12, count=2) == take(source, start=start, count=4)[1:3]


def remove(folder: str, entries: Sequence[tuple[str, str]]) -> None:
    lines = [json.dumps({"shard": shard, "key": key, "reason": "asked", "time": ""}) + "\n" for shard, key in entries]
    (Path(folder) / ".ldm" / REMOVED).write_text("".join(lines))


def test_removed_samples_are_replaced_alike_everywhere_and_are_no_fault(tmp_path):
    folder = str(tmp_path / "a")
    write_latents(Path(folder), (10, 13))
    before = latent_stream(DataConfig(latents=folder, transform=TRANSFORM), seed=1)
    whole = take(before, start=0, count=6)
    remove(folder, [("0.tar", "0004"), ("1.tar", "0015")])
    noted = []
    strict = DataConfig(latents=folder, transform=TRANSFORM, max_bad_share=0)
    source = latent_stream(strict, seed=1, on_bad=lambda *bad: noted.append(bad))
    source.order.require_same(before.order.state())
    assert source.order_id == before.order_id, "a live run resumes"
    after = take(source, start=0, count=6)
    for one, other in zip(chain(*whole), chain(*after), strict=True):
        assert (one == other) == (one not in ("0004", "0015")) and other not in ("0004", "0015")
    assert sorted((key, reason) for key, reason, _ in noted) == [("0004", "removed"), ("0015", "removed")]
    assert source.shares()["data/removed"] > 0 == source.shares()["data/bad"]
    again = latent_stream(strict, seed=1)
    assert take(again, start=24, count=2, world=3) == after[2:4]


def test_removed_images_are_replaced_too(tmp_path, jpeg):
    write_images(tmp_path / "i", jpeg)
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"shard": "0.tar", "key": "0003"}\n')
    config = DataConfig(images=str(tmp_path / "i"), removed=[str(listed)], transform=TRANSFORM, max_bad_share=0)
    keys = [key for batch in take(image_stream(config, seed=0), start=0, count=5) for key in batch]
    assert len(set(keys)) == 14 and "0003" not in keys


def test_new_captions_on_an_old_cache_rewrite_nothing(tmp_path):
    folder = tmp_path / "a"
    write_latents(folder, (10, 13))
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}
    new = tmp_path / "new.parquet"
    pq.write_table(pa.table({"key": [f"{i:04d}" for i in range(20)], "better": [f"new {i}" for i in range(20)]}), new)
    captions = CaptionsConfig(file=str(new), columns={"better": 1.0})
    old = latent_stream(DataConfig(latents=str(folder), transform=TRANSFORM), seed=1)
    source = latent_stream(DataConfig(latents=str(folder), captions=captions, transform=TRANSFORM), seed=1)
    batch = source.read(np.arange(23))
    assert batch.captions == [f"{'new' if int(key) < 20 else 'caption'} {int(key)}" for key in batch.keys]
    assert source.order_id == old.order_id and torch.equal(batch.moments, old.read(np.arange(23)).moments)
    assert source.shares()["data/own_caption"] == pytest.approx(3 / 23)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before


def test_mirror_images_are_drawn_by_position(tmp_path):
    write_latents(tmp_path / "a", (10, 200), first=1, mirrored=True)
    config = DataConfig(latents=str(tmp_path / "a"), mirror=True, transform=TRANSFORM)
    batch = latent_stream(config, seed=1).read(np.arange(2100))
    signs = batch.moments[:, 0, 0, 0] / torch.tensor([int(key) for key in batch.keys])
    assert signs.unique().tolist() == [-1, 1] and abs(signs.float().mean()) < 0.07
    assert torch.equal(latent_stream(config, seed=1).read(np.arange(60, 90)).moments, batch.moments[60:90])
    plain = latent_stream(DataConfig(latents=str(tmp_path / "a"), transform=TRANSFORM), seed=1).read(np.arange(210))
    assert plain.moments.min() > 0
    write_latents(tmp_path / "b", (3,))
    with pytest.raises(ValueError, match=r"data\.mirror=true, but .*precompute\.flip=true"):
        latent_stream(DataConfig(latents=str(tmp_path / "b"), mirror=True, transform=TRANSFORM), seed=1)


def test_images_mix_and_stay_keyed_by_position(tmp_path, jpeg):
    for name in "ab":
        write_images(tmp_path / name, jpeg)
    parts = {
        name: MixedSourceConfig(images=str(tmp_path / name), weight=weight) for name, weight in (("a", 1), ("b", 3))
    }
    config = DataConfig(mixture=parts, transform=ImageTransformConfig(size=8, crop=Crop.random))
    whole = image_stream(config, seed=2).read(np.arange(40))
    assert torch.equal(image_stream(config, seed=2).read(np.arange(7, 19)).images, whole.images[7:19])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"mirror": True, "source": Origin.images}, r"data\.mirror=true is for cached latents"),
        ({"mixture": {"a": MixedSourceConfig(weight=1)}, "selection": ["s"]}, r"data\.mixture\.NAME\.selection"),
        ({"mixture": {"a": MixedSourceConfig(weight=0)}}, r"data\.mixture\.a\.weight=0"),
        ({"mixture": {"a": MixedSourceConfig(weight=1, images="pipe:ls")}}, r"data\.mixture\.a\.images=.*shell"),
    ],
)
def test_impossible_views_and_mixtures_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(transform=TRANSFORM, **wrong)


def test_a_source_without_what_it_needs_is_named():
    config = DataConfig(mixture={"art": MixedSourceConfig(images="x", weight=1)}, transform=TRANSFORM)
    with pytest.raises(ValueError, match=r"data\.mixture\.art\.latents is not set"):
        latent_stream(config, seed=0)
