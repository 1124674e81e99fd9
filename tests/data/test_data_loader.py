import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ldm_scale.data.cache import CacheShardWriter, LatentCache, fingerprint, finish_cache
from ldm_scale.data.config import DataConfig
from ldm_scale.data.loader import Loader
from ldm_scale.data.order import Order
from ldm_scale.data.samples import Task
from ldm_scale.data.shards import ShardSet, ShardWriter
from ldm_scale.data.sources import ImageSource, LatentSource, TooManyBadSamples
from ldm_scale.images.resize import Crop, ImageTransformConfig

N = 50
SHAPE = (2, 3, 3)


@pytest.fixture
def cache(tmp_path) -> LatentCache:
    """Latent i is all i, over three shards."""
    transform = {"size": 8, "flip": False}
    first_stage = {"kind": "kl", "config": {}, "sha256": "0"}
    printed = fingerprint(first_stage_kind="kl", first_stage_sha256="0", transform=transform, kind="point")
    records = []
    for shard, numbers in enumerate((range(20), range(20, 45), range(45, N))):
        with CacheShardWriter(tmp_path / f"{shard}.tar", fingerprint=printed, kind="point") as writer:
            for i in numbers:
                writer.add(f"{i:04d}", np.full(SHAPE, i), f"caption {i}")
            records.append(writer.finish(source="", source_sha256=""))
    finish_cache(tmp_path, records, first_stage=first_stage, transform=transform, kind="point")
    return LatentCache.open(str(tmp_path))


def lengths(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[len(caption)] for caption in captions])


@pytest.fixture
def source(cache) -> LatentSource:
    return LatentSource(cache, Order(n=N, seed=3, block=4, window=4, lanes=2), lengths)


def take(loader: Loader, start: int, count: int) -> list:
    """(positions, keys, first number of each latent) of some micro batches, copied out."""
    with loader:
        batches = loader.batches(start)
        return [
            (batch.positions.tolist(), batch.keys, batch.moments[:, 0, 0, 0].tolist())
            for batch in (next(batches) for _ in range(count))
        ]


def test_batch_holds_what_the_order_says(source):
    positions = np.array([0, 49, 50, 120])
    batch = source.read(positions)
    ids = source.order(positions)
    assert batch.positions.tolist() == positions.tolist() and batch.positions.dtype == torch.int64
    assert batch.keys == [f"{i:04d}" for i in ids] and batch.captions == [f"caption {i}" for i in ids]
    assert batch.moments.dtype == torch.float16 and batch.moments.shape == (4, *SHAPE)
    assert batch.moments[:, 0, 0, 0].tolist() == ids.tolist()
    assert batch.inputs is not None and batch.inputs.tolist() == [[len(f"caption {i}")] for i in ids]


def test_unconditional_source_prepares_nothing(cache):
    assert LatentSource(cache, Order(n=N, seed=0)).read(np.arange(2)).inputs is None


def test_every_sample_once_an_epoch_through_the_loader(source):
    seen = [key for _, keys, _ in take(Loader(source, global_batch=10, micro_batch=5), 0, 20) for key in keys]
    assert sorted(seen[:N]) == sorted(seen[N:]) == [f"{i:04d}" for i in range(N)]
    assert seen[:N] != seen[N:]


@pytest.mark.parametrize("world, micro_batch", [(1, 12), (2, 6), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_same_global_batch_in_every_world(source, world, micro_batch):
    """From a position that is no multiple of the global batch, over an epoch's end."""
    steps, start = 6, 7
    per_rank = 12 // world // micro_batch
    ranks = [
        take(Loader(source, global_batch=12, micro_batch=micro_batch, rank=rank, world=world), start, steps * per_rank)
        for rank in range(world)
    ]
    for step in range(steps):
        wanted = np.arange(start + 12 * step, start + 12 * (step + 1))
        for rank, batches in enumerate(ranks):
            mine = batches[step * per_rank : (step + 1) * per_rank]
            assert [p for positions, _, _ in mine for p in positions] == wanted[rank::world].tolist()
            values = [v for _, _, numbers in mine for v in numbers]
            assert values == source.order(wanted[rank::world]).tolist()


def test_resume_is_the_same_stream(source):
    whole = take(Loader(source, global_batch=4, micro_batch=2), 0, 40)
    assert take(Loader(source, global_batch=4, micro_batch=2), 48, 16) == whole[24:]


def test_long_streams_cross_the_lookahead(source):
    batches = take(Loader(source, global_batch=64, micro_batch=64), 0, 140)
    positions = np.array([p for positions, _, _ in batches for p in positions])
    np.testing.assert_array_equal(positions, np.arange(140 * 64))
    np.testing.assert_array_equal([v for _, _, numbers in batches for v in numbers], source.order(positions))


def test_a_batch_stays_through_the_next_one(source):
    """The ring of buffers: a batch is whole until the second `next` after it."""
    with Loader(source, global_batch=5, micro_batch=5, ahead=2) as loader:
        batches = loader.batches(0)
        previous = next(batches)
        addresses = set()
        for _ in range(50):
            before = previous.moments.clone()
            batch = next(batches)
            time.sleep(0.001)
            assert torch.equal(previous.moments, before)
            addresses.add(batch.moments.data_ptr())
            previous = batch
    assert len(addresses) <= 4, "buffers are reused"


def test_waiting_is_measured(source):
    slow = LatentSource(source.cache, source.order, lambda captions: time.sleep(0.05) or lengths(captions))
    with Loader(slow, global_batch=2, micro_batch=2) as loader:
        batches = loader.batches(0)
        for _ in range(4):
            next(batches)
        assert 0.1 < loader.wait_s < 5


def test_errors_of_the_thread_reach_the_consumer(source):
    def explode(captions: list[str]) -> torch.Tensor:
        raise ZeroDivisionError("in the thread")

    broken = LatentSource(source.cache, source.order, explode)
    with Loader(broken, global_batch=2, micro_batch=2) as loader:
        batches = loader.batches(0)
        with pytest.raises(ZeroDivisionError, match="in the thread"):
            next(batches)


@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_close_ends_the_thread_whatever_it_is_doing(source, consumed):
    loader = Loader(source, global_batch=2, micro_batch=2)
    batches = loader.batches(0)
    for _ in range(consumed):
        next(batches)
    closed = threading.Thread(target=loader.close)
    closed.start()
    closed.join(5)
    assert not closed.is_alive()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_a_second_stream_replaces_the_first(source):
    with Loader(source, global_batch=2, micro_batch=2) as loader:
        next(loader.batches(0))
        assert next(loader.batches(6)).positions.tolist() == [6, 7]
        assert len([thread for thread in threading.enumerate() if thread.name == "prefetch"]) == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"global_batch": 10, "micro_batch": 4}, "multiple of micro_batch=4 x world=1"),
        ({"global_batch": 8, "micro_batch": 4, "world": 4}, "x world=4"),
        ({"global_batch": 8, "micro_batch": 4, "world": 2, "rank": 2}, "rank=2 in a world of 2"),
    ],
)
def test_batches_that_do_not_fit_are_refused(source, wrong, message):
    with pytest.raises(ValueError, match=message):
        Loader(source, **wrong)


def test_order_of_another_set_is_refused(cache):
    with pytest.raises(ValueError, match=r"over 49 samples, the data set has 50"):
        LatentSource(cache, Order(n=49, seed=0))


def damage(folder: str, needle: bytes) -> None:
    for path in Path(folder).glob("*.tar"):
        data = bytearray(path.read_bytes())
        if (at := data.find(needle)) >= 0:
            data[at] ^= 1
            path.write_bytes(data)


def test_bad_latents_are_replaced_the_same_way_on_every_rank(cache):
    damage(cache.folder, b"caption 33")
    order = Order(n=N, seed=3)
    position = int(order.inverse(np.array([33]), 0)[0])
    calls = []
    keys = []
    for positions in (np.arange(N), np.array([position])):
        source = LatentSource(cache, order, on_bad=lambda *bad: calls.append(bad))
        batch = source.read(positions)
        keys.append(batch.keys[position] if len(positions) > 1 else batch.keys[0])
        assert source.substitutes.bad == 1
    assert keys[0] == keys[1] != "0033"
    assert calls == [("0033", "checksum_txt", position)] * 2


def test_too_many_bad_samples_stop(cache):
    for i in range(20, 45):
        damage(cache.folder, f"caption {i}".encode())
    source = LatentSource(cache, Order(n=N, seed=3), max_bad_share=0.01)
    with pytest.raises(TooManyBadSamples, match=r"data\.max_bad_share=0\.01"):
        source.read(np.arange(N))
    strict = LatentSource(cache, Order(n=N, seed=3), max_bad_share=0)
    with pytest.raises(TooManyBadSamples, match="1 of 50"):
        strict.read(np.arange(N))


def image_source(folder: str, **options) -> ImageSource:
    shards = ShardSet.open(folder, require=Task.text.require)
    transform = ImageTransformConfig(size=8, crop=Crop.random).build()
    return ImageSource(shards, Order(n=shards.n, seed=1), transform, seed=1, prepare=lengths, **options)


def test_images_are_decoded_and_depend_on_position_only(image_shards):
    source = image_source(image_shards)
    batch = source.read(np.arange(30))
    assert batch.images.shape == (30, 3, 8, 8) and batch.images.dtype == torch.float32
    assert batch.images.min() >= -1 and batch.images.max() <= 1
    assert sorted(batch.keys[:15]) == [f"{i:06d}" for i in range(15)]
    for i, key in enumerate(batch.keys):
        number = int(key)
        colour = torch.tensor([number * 37 % 256, number * 11 % 256, 128]) / 127.5 - 1
        assert torch.allclose(batch.images[i].mean(dim=(1, 2)), colour, atol=0.05)
        assert batch.captions[i] == f"caption {number}"
    assert torch.equal(source.read(np.array([17, 4])).images, batch.images[[17, 4]])


def test_bad_images_are_replaced_and_named(tmp_path, jpeg):
    with ShardWriter(tmp_path / "0.tar") as writer:
        for i in range(10):
            writer.add(f"{i}", {"jpg": jpeg(i), "txt": b""})
        writer.add("broken", {"jpg": jpeg(3)[:200], "txt": b""})
        writer.add("empty", {"jpg": b"", "txt": b""})
    calls = []
    source = image_source(str(tmp_path), max_bad_share=0.5, on_bad=lambda *bad: calls.append(bad))
    batch = source.read(np.arange(12))
    assert {key for key, _, _ in calls} >= {"broken", "empty"} and not {"broken", "empty"} & set(batch.keys)
    assert torch.equal(image_source(str(tmp_path), max_bad_share=0.5).read(np.arange(12)).images, batch.images)


def test_a_set_of_bad_images_stops(tmp_path):
    with ShardWriter(tmp_path / "0.tar") as writer:
        for i in range(3):
            writer.add(f"{i}", {"jpg": b"no image", "txt": b""})
    with pytest.raises(TooManyBadSamples, match="none of 16 substitutes"):
        image_source(str(tmp_path), max_bad_share=1.0).read(np.arange(3))


def test_images_through_the_loader(image_shards):
    with Loader(image_source(image_shards), global_batch=6, micro_batch=3) as loader:
        batches = loader.batches(0)
        keys = [key for _ in range(5) for key in next(batches).keys]
    assert sorted(keys) == [f"{i:06d}" for i in range(15)]


def test_config_opens_what_it_names(image_shards, tmp_path):
    transform = ImageTransformConfig(size=8)
    config = DataConfig(images=image_shards, transform=transform)
    assert config.open_images()["data"].n == 15
    with pytest.raises(ValueError, match=r"data\.latents is not set"):
        config.open_latents()
    with pytest.raises(ValueError, match=r"data\.images is not set"):
        DataConfig(transform=transform).open_images()
    with pytest.raises(FileNotFoundError, match="unfinished latent cache"):
        DataConfig(latents=image_shards, transform=transform).open_latents()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_bad_share": 1.5}, r"data\.max_bad_share=1\.5"),
        ({"threads": 0}, r"data\.threads=0"),
        ({"images": "pipe:aws s3 cp s3://b/{000..100}.tar -"}, r"data\.images=.*shell"),
        ({"latents": "a::pipe:cat b"}, r"data\.latents=.*shell"),
    ],
)
def test_impossible_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(transform=ImageTransformConfig(size=8), **wrong)
