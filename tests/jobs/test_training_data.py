"""Views, mixtures and images encoded in the step: whole trainings, by the commands a user types."""

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import remove
from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.cache import CacheManifest, CacheShardWriter, LatentCache, finish_cache
from ldm_scale.data.views import write_selection
from ldm_scale.jobs import repro

pytestmark = pytest.mark.slow


def curve(run_dir: RunDir, name: str) -> list[float]:
    return [line[name] for line in run_dir.read_lines(run_dir.metrics) if name in line]


def train(world: Any, name: str, *overrides: str) -> RunDir:
    world.run(world.tiny_training(f"name={name}", *overrides))
    return RunDir(world.path / "runs" / "txt2img_laion" / name)


def test_images_encoded_in_the_step_give_the_loss_of_the_cache(world: Any) -> None:
    """To 1e-4 of the loss (1e-7 was measured): encoding in batches of another size may round otherwise."""
    scale = 1 / CacheManifest.read_from(f"{world.path}/latents").latent_std
    cached = train(world, "cached", f"first_stage.scale={scale}")
    encoded = train(world, "encoded", f"first_stage.scale={scale}", "data.source=images")
    np.testing.assert_allclose(curve(encoded, "train/loss"), curve(cached, "train/loss"), rtol=1e-4)


def test_without_a_cache_the_first_batch_says_the_scale(world: Any) -> None:
    run_dir = train(world, "first_batch", "data.source=images", "data.transform.flip=true", "total_images=24")
    state = storage.read_json(run_dir.checkpoints / "images_000000000024" / "complete.json")["state"]
    std = CacheManifest.read_from(f"{world.path}/latents").latent_std
    assert state["latent_scale"] == pytest.approx(1 / std, rel=0.2)


def test_a_mixture_of_views_is_read_as_often_as_it_says(world: Any) -> None:
    cache = LatentCache.open(f"{world.path}/latents")
    names, keys = [record.name for record in cache.manifest.shards], cache.keys(np.arange(cache.n))
    shards = [names[0] if i < cache.manifest.shards[0].written else names[1] for i in range(cache.n)]
    for name, chosen in (("few", slice(0, 30)), ("many", slice(30, None))):
        write_selection(world.path / f"{name}.parquet", shards[chosen], keys[chosen], {})
    parts = ", ".join(
        f"{name}: {{latents: {world.path}/latents, selection: [{world.path}/{name}.parquet], weight: {weight}}}"
        for name, weight in (("few", 1), ("many", 2))
    )
    run_dir = train(world, "mixed", f"+data.mixture={{{parts}}}", f"data.index_dir={world.path}/index")
    few, many = curve(run_dir, "data/few/read"), curve(run_dir, "data/many/read")
    assert [a + b for a, b in zip(few, many, strict=True)] == curve(run_dir, "train/images_seen")
    np.testing.assert_allclose(few, curve(run_dir, "data/few/asked"), atol=1.1)
    assert curve(run_dir, "data/few/bad") == [0.0] * len(few)


def encode_again(folder: Path, shard: int) -> None:
    """A lost shard made anew, on another kind of machine: its latents differ in the last bits."""
    cache = LatentCache.open(str(folder))
    manifest, record = cache.manifest, cache.manifest.shards[shard]
    moments, captions, keys = cache.read(np.arange(cache.starts[shard], cache.starts[shard + 1]))
    with CacheShardWriter(folder / record.name, fingerprint=manifest.fingerprint, kind=manifest.kind) as writer:
        for key, caption, one in zip(keys, captions, np.nextafter(moments, np.float16(9)), strict=True):
            writer.add(key, one, caption)
        made = writer.finish(source=record.source["name"], source_sha256=record.source["sha256"])
    records = [made if place == shard else other for place, other in enumerate(manifest.shards)]
    finish_cache(folder, records, first_stage=manifest.first_stage, transform=manifest.transform, kind=manifest.kind)


def test_a_live_run_goes_on_with_a_shard_encoded_again_samples_removed_and_new_captions(
    world: Any, tmp_path: Path
) -> None:
    """The order stays; what changed is on record; others stand in for the removed; captions cost the cache no byte."""
    folder = tmp_path / "latents"
    shutil.copytree(world.path / "latents", folder)
    command = world.tiny_training("name=live", f"data.latents={folder}", "total_images=480", "every.evaluate=480")
    run_dir = RunDir(world.path / "runs" / "txt2img_laion" / "live")
    saved = run_dir.checkpoints / "images_000000000032"
    assert world.interrupted(command, saved.exists, signal.SIGTERM) == 75
    encode_again(folder, 1)
    cache = LatentCache.open(str(folder))
    moments, _, gone = cache.read(np.array([5, 50]))
    new = {"key": cache.keys(np.arange(cache.n)), "new": [f"a new caption {i}" for i in range(cache.n)]}
    pq.write_table(pa.table(new), tmp_path / "captions.parquet")
    assert remove.main([str(folder), "--key", *gone, "--reason", "asked", "--runs", str(run_dir.path)]) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert not [name for name, data in before.items() for one in moments if one.tobytes()[:64] in data]
    captions = f"data.captions.file={tmp_path}/captions.parquet"
    world.run([*command, captions, "+data.captions.columns={new: 1.0}", "amend=true"])
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    first, second = (launch["data"] for launch in repro.launches(run_dir))
    assert first["order_id"] == second["order_id"] and first["content_id"] != second["content_id"]
    events = run_dir.read_lines(run_dir.events)
    unread = [one for event in events if event["event"] == "unread" for one in event["samples"]]
    assert {one["key"] for one in unread if one["reason"] == "removed"} == set(gone)
    assert curve(run_dir, "data/unread_removed")[-1] == 2
    assert "data.captions.file" in next(event["changed"] for event in events if event["event"] == "resume")
    assert curve(run_dir, "data/removed")[-1] > 0 == curve(run_dir, "data/bad")[-1]
    assert curve(run_dir, "data/own_caption")[-1] == 0
    assert storage.read_json(run_dir.status)["state"] == "finished"
