import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from data_tools.trace import main
from ldm_scale.core import storage
from ldm_scale.data.cache import CacheShardWriter, LatentCache, fingerprint, finish_cache
from ldm_scale.data.loader import Loader
from ldm_scale.data.mixture import preset_mixture
from ldm_scale.data.order import OrderPreset, preset_order
from ldm_scale.data.samples import Task
from ldm_scale.data.shards import ShardSet
from ldm_scale.data.sources import ImageSource, LatentSource
from ldm_scale.images.resize import ImageTransformConfig
from ldm_scale.jobs import config
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import EngineConfig, EngineKind
from ldm_scale.training.optimizer import OptimizerConfig

SEED, BATCH, WORLD = 5, 12, 3


@pytest.fixture
def images(tmp_path, dataset) -> str:
    """Three shards of 5, 7 and 3 images."""
    shards = [[{} for _ in range(count)] for count in (5, 7, 3)]
    folder = dataset(tmp_path / "images", shards, parquet=False, stats=False)
    return str(folder)


@pytest.fixture
def latents(tmp_path) -> LatentCache:
    """Fifty latents in three shards."""
    transform, first_stage = {"size": 8, "flip": False}, {"kind": "kl", "config": {}, "sha256": "0"}
    printed = fingerprint(first_stage_kind="kl", first_stage_sha256="0", transform=transform, kind="point")
    folder, records = tmp_path / "latents", []
    for shard, numbers in enumerate((range(20), range(20, 45), range(45, 50))):
        with CacheShardWriter(folder / f"{shard}.tar", fingerprint=printed, kind="point") as writer:
            for i in numbers:
                writer.add(f"{i:04d}", np.full((2, 3, 3), i), f"caption {i}")
            records.append(writer.finish(source="", source_sha256=""))
    finish_cache(folder, records, first_stage=first_stage, transform=transform, kind="point")
    return LatentCache.open(str(folder))


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def loaded(source: ImageSource | LatentSource, *, start: int, count: int, rank: int = 0) -> list[dict]:
    """Position and key of what a real loader hands out."""
    with Loader(source, global_batch=BATCH, micro_batch=2, rank=rank, world=WORLD) as loader:
        stream, found = loader.batches(start), []
        while len(found) < count:
            batch = next(stream)
            found += [{"position": p, "key": k} for p, k in zip(batch.positions.tolist(), batch.keys, strict=True)]
    return found[:count]


def without_shard(rows: list[dict]) -> list[dict]:
    return [{name: row[name] for name in ("position", "key")} for row in rows]


def ranks(rank: int, start: int, count: int) -> list[str]:
    where = ["--rank", str(rank), "--world", str(WORLD), "--global-batch", str(BATCH)]
    return [*where, "--from", str(start), "--count", str(count), "--json"]


@pytest.mark.parametrize("preset", OrderPreset)
@pytest.mark.parametrize("rank", range(WORLD))
def test_prints_the_keys_that_a_loader_of_latents_reads(latents, capsys, preset, rank):
    source = LatentSource(latents, preset_order(preset, n=latents.n, seed=SEED))
    command = [latents.folder, "--seed", str(SEED), "--preset", preset.name]
    assert main([*command, *ranks(rank, 7, 61)]) == 0
    rows = lines(capsys)
    assert without_shard(rows) == loaded(source, start=7, count=61, rank=rank)
    for row in rows:
        assert row["shard"] == f"{np.searchsorted([20, 45], int(row['key']), side='right')}.tar"


def test_prints_the_keys_that_a_loader_of_images_reads(images, capsys):
    shards = ShardSet.open(images, require=Task.text.require)
    order = preset_order(OrderPreset.random_access, n=shards.n, seed=SEED)
    source = ImageSource(shards, order, ImageTransformConfig(size=8).build(), SEED)
    assert main([images, "--seed", str(SEED), *ranks(1, 4, 40)]) == 0
    rows = lines(capsys)
    assert without_shard(rows) == loaded(source, start=4, count=40, rank=1)
    assert all(row["shard"] == f"{row['key'][:5]}.tar" for row in rows)


def test_some_tars_of_a_cache(latents, capsys):
    some = f"{latents.folder}/{{1..2}}.tar"
    source = LatentSource(LatentCache.open(some), preset_order(OrderPreset.random_access, n=30, seed=SEED))
    assert main([some, "--seed", str(SEED), *ranks(0, 0, 30)]) == 0
    rows = lines(capsys)
    assert without_shard(rows) == loaded(source, start=0, count=30)
    assert {row["shard"] for row in rows} == {"1.tar", "2.tar"}


def test_samples_that_the_task_cannot_use_have_no_number(tmp_path, dataset, capsys):
    folder = dataset(tmp_path / "images", [[{}, {"members": {"cls": b"1"}}, {"members": {"cls": b"2"}}]])
    assert main([str(folder), "--seed", "0", "--task", "class_label", "--count", "4", "--json"]) == 0
    assert {row["key"] for row in lines(capsys)} == {"000000001", "000000002"}


def test_a_key_is_read_at_the_positions_told(latents, capsys):
    assert main([latents.folder, "--seed", str(SEED), "--key", "0033", "--json"]) == 0
    (told,) = lines(capsys)
    assert told["shard"] == "1.tar" and told["checkpoints"] == {} and len(told["positions"]) == 3
    order = preset_order(OrderPreset.random_access, n=50, seed=SEED)
    assert order(np.array(told["positions"])).tolist() == [33] * 3
    assert main([latents.folder, "--seed", str(SEED), "--key", "0033"]) == 0
    words = capsys.readouterr().out
    assert words.startswith(f"0033 in 1.tar of {latents.folder}\n  read at positions {told['positions'][0]:,}, ")
    assert main([latents.folder, "--seed", str(SEED), "--key", "nobody"]) == 1
    assert "no sample of" in capsys.readouterr().out


def test_a_key_that_shards_repeat_is_told_for_each(tmp_path, dataset, capsys):
    folder = dataset(tmp_path / "images", [[{"key": "twin"}, {}], [{}, {"key": "twin"}]])
    assert main([str(folder), "--seed", "0", "--key", "twin", "--json"]) == 0
    assert [told["shard"] for told in lines(capsys)] == ["00000.tar", "00001.tar"]


def test_several_sources(latents, images, capsys):
    mixture = preset_mixture(OrderPreset.window, sizes=[50, 15], weights=[0.8, 0.2], seed=SEED)
    command = [latents.folder, images, "--weights", "0.8", "0.2", "--seed", str(SEED), "--preset", "window"]
    assert main([*command, "--from", "30000", "--count", "300", "--json"]) == 0
    rows = lines(capsys)
    source, sample = mixture(np.arange(30_000, 30_300))
    shards = ShardSet.open(images)
    for row, number, own in zip(rows, source, sample, strict=True):
        opened = (latents, shards)[number]
        assert row["key"] == opened.keys(np.array([own]))[0]
        assert row["source"] == (latents.folder, images)[number]
    assert 50 < sum(source) < 70
    key = next(row["key"] for row in rows if row["source"] == images)
    assert main([*command, "--key", key, "--json"]) == 0
    (told,) = lines(capsys)
    source, sample = mixture(np.array(told["positions"]))
    assert source.tolist() == [1, 1, 1] and shards.keys(sample) == [key] * 3


@pytest.fixture
def run(tmp_path, latents) -> Path:
    """A run directory as training writes it: real configuration, real checkpoints, no training."""
    folder = tmp_path / "run"
    where = [f"data.latents={latents.folder}", "data.order=window", f"seed={SEED}", "global_batch=12", "micro_batch=2"]
    job = config.compose("train", ["+experiment=txt2img_laion", "scale=toy", *where])
    storage.write_json(folder / "config.json", config.to_plain(job))
    return folder


def save_checkpoints(run: Path, latents: LatentCache, seen: list[int], **state) -> None:
    engine = EngineConfig(kind=EngineKind.one_process).build(global_batch=12, micro_batch=2)
    engine.prepare(nn.Linear(2, 2), OptimizerConfig(learning_rate=1e-3))
    ema = EMA(engine.masters, [4])
    checkpoints = Checkpoints(run / "checkpoints", masters=engine.masters, ema=ema, module=engine.module, keep_last=9)
    order = preset_order(OrderPreset.window, n=latents.n, seed=SEED).state()
    for images_seen in seen:
        checkpoints.save({"images_seen": images_seen, "order_id": latents.order_id, "order": order} | state)
    checkpoints.drain()
    engine.close()


def test_a_run_knows_its_data_seed_and_preset(run, latents, capsys):
    source = LatentSource(latents, preset_order(OrderPreset.window, n=50, seed=SEED))
    wanted = loaded(source, start=24, count=20, rank=2)
    where = ["--run", str(run), "--rank", "2", "--world", str(WORLD), "--from", "24", "--count", "20", "--json"]
    assert main(where) == 0
    assert without_shard(lines(capsys)) == wanted
    save_checkpoints(run, latents, [24])
    assert main(where) == 0
    assert without_shard(lines(capsys)) == wanted


def test_checkpoints_that_have_seen_a_key_are_told(run, latents, capsys):
    order = preset_order(OrderPreset.window, n=50, seed=SEED)
    first, second = (int(order.inverse(np.array([33]), epoch)[0]) for epoch in (0, 1))
    save_checkpoints(run, latents, [first, first + 1, second + 1])
    abandoned = run / "checkpoints" / f"images_{first + 1:012d}"
    abandoned.rename(abandoned.with_name(f"{abandoned.name}.abandoned"))
    assert main(["--run", str(run), "--key", "0033", "--json"]) == 0
    (told,) = lines(capsys)
    assert told["positions"][:2] == [first, second]
    assert told["checkpoints"] == {
        f"images_{first:012d}": 0,
        f"images_{first + 1:012d}.abandoned": 1,
        f"images_{second + 1:012d}": 2,
    }
    assert main(["--run", str(run), "--key", "0033"]) == 0
    words = capsys.readouterr().out
    assert f"images_{first:012d}  has not seen it" in words and "has seen it 2 times" in words


def test_the_order_of_the_checkpoints_counts_not_that_of_today(run, latents, capsys):
    other = preset_order(OrderPreset.random_access, n=50, seed=99)
    save_checkpoints(run, latents, [12], order=other.state())
    assert main(["--run", str(run), "--count", "20", "--json"]) == 0
    assert [int(row["key"]) for row in lines(capsys)] == other(np.arange(20)).tolist()


def test_data_that_moved_and_data_that_are_others(run, latents, capsys, tmp_path, images):
    save_checkpoints(run, latents, [12])
    assert main(["--run", str(run), "--json"]) == 0
    before = capsys.readouterr().out
    moved = shutil.move(latents.folder, tmp_path / "moved")
    assert main(["--run", str(run)]) == 2
    capsys.readouterr()
    assert main([str(moved), "--run", str(run), "--json"]) == 0
    assert capsys.readouterr().out == before
    assert main([images, "--run", str(run)]) == 2
    assert f"has read samples {latents.order_id[:12]}, {images} holds" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give a DATASET and --seed, or --run"),
        (["DATA"], "give a DATASET and --seed"),
        (["DATA", "--seed", "0", "--world", "4"], "--world 4 without --global-batch"),
        (["DATA", "--seed", "0", "--world", "4", "--global-batch", "6"], "no multiple of --world 4"),
        (["DATA", "--seed", "0", "--world", "2", "--rank", "2", "--global-batch", "6"], "--rank 2 in a world of 2"),
        (["DATA", "--seed", "0", "--from", "-1"], "at least position 0"),
        (["DATA", "DATA", "--seed", "0", "--weights", "1"], "2 data sets with 1 --weights"),
        (["--run", "RUN", "--seed", "0"], "--seed with --run"),
        (["--run", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, told, latents, run, capsys):
    names = {"DATA": latents.folder, "RUN": str(run)}
    assert main([names.get(argument, argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and told in said and said.count("\n") == 1
