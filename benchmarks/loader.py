"""How fast cached latents are read: our reader against `cat` of the same tars and against plain webdataset, in one run.

    python benchmarks/loader.py [--samples 20000] [--batch 64] [--folder /tmp/ldm_bench_loader]

Writes synthetic moments (float16, 8 x 32 x 32, 16 KiB) with captions of 80 bytes once, then reads them from the page
cache in one process. Each figure is the best of several passes. Compare ratios, not rates. Last, how long a training
waits for data that keeps every core busy and takes 1,000 samples a second.
"""

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset

from ldm_scale.data.cache import CacheShardWriter, LatentCache, fingerprint, finish_cache
from ldm_scale.data.loader import Loader
from ldm_scale.data.order import Order
from ldm_scale.data.sources import LatentSource

SHAPE = (8, 32, 32)
PASSES = 5
BUSY_RATE = 1000  # samples a second
BUSY_STEPS = 100


def write_cache(folder: Path, samples: int) -> None:
    """A cache of four shards of random moments."""
    transform, first_stage = {"size": 256, "flip": False}, {"kind": "synthetic", "config": {}, "sha256": "0"}
    printed = fingerprint(first_stage_kind="synthetic", first_stage_sha256="0", transform=transform, kind="gaussian")
    pool = np.random.default_rng(0).normal(size=(256, *SHAPE)).astype(np.float16)
    records = []
    for shard in range(4):
        with CacheShardWriter(folder / f"{shard:05d}.tar", fingerprint=printed, kind="gaussian") as writer:
            for i in range(samples // 4):
                writer.add(f"{shard:05d}{i:06d}", pool[i % 256], f"caption {i} ".ljust(80, "x"))
            records.append(writer.finish(source="synthetic", source_sha256="0"))
    finish_cache(folder, records, first_stage=first_stage, transform=transform, kind="gaussian")


def cat(folder: Path) -> None:
    """The limit: every byte once, through a pipe-free read by another program."""
    with open(os.devnull, "wb") as sink:
        subprocess.run(["cat", *sorted(map(str, folder.glob("*.tar")))], stdout=sink, check=True)


def plain_webdataset(folder: Path, batch: int) -> None:
    """What a user of webdataset writes: decode, batch, stack."""
    urls = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("npy", "txt").batched(batch)
    for moments, _ in dataset:
        torch.from_numpy(np.stack(moments) if isinstance(moments, list) else moments)


def delivered(cache: LatentCache, ids: np.ndarray, batch: int) -> None:
    """Batches of torch tensors, samples in the order of `ids`: checksums, keys and captions, one reused buffer."""
    source = LatentSource(cache, Order(n=cache.n, seed=0))
    out = source.buffer(batch, pinned=False)
    for begin in range(0, len(ids) - batch + 1, batch):
        some = ids[begin : begin + batch]
        source.read(some, ids=some, out=out)


def loaded(cache: LatentCache, order: Order, batch: int) -> None:
    """One epoch as a training has it: the order too, and a thread that reads ahead into a ring of buffers."""
    with Loader(LatentSource(cache, order), global_batch=batch, micro_batch=batch) as loader:
        batches = loader.batches(0)
        for _ in range(cache.n // batch):
            next(batches)


def wait_share(cache: LatentCache, order: Order, batch: int) -> float:
    """Share of its time that a training waits for data whose steps of torch arithmetic leave no core idle."""
    left, right = torch.randn(2, 768, 768)
    with Loader(LatentSource(cache, order), global_batch=batch, micro_batch=batch) as loader:
        batches = loader.batches(0)
        next(batches)
        began, waited = time.perf_counter(), loader.wait_s
        for step in range(1, BUSY_STEPS + 1):
            next(batches)
            while time.perf_counter() < began + step * batch / BUSY_RATE:
                left @ right
        return (loader.wait_s - waited) / (time.perf_counter() - began)


def rates_of(samples: int, rows: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Samples a second of each row: its best pass, rows taking turns so that a busy machine hits all alike."""
    best = dict.fromkeys(rows, float("inf"))
    for _ in range(PASSES + 1):
        for name, read in rows.items():
            began = time.perf_counter()
            read()
            best[name] = min(best[name], time.perf_counter() - began)
    return {name: samples / seconds for name, seconds in best.items()}


def main() -> None:
    """Write the cache if need be, and print one line a reader."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/ldm_bench_loader"))
    options = parser.parse_args()
    if not (options.folder / "manifest.json").exists():
        write_cache(options.folder, options.samples)
    cache = LatentCache.open(str(options.folder))
    order = Order(n=cache.n, seed=0)
    rows = {
        "cat": lambda: cat(options.folder),
        "plain webdataset": lambda: plain_webdataset(options.folder, options.batch),
        "ours, in order": lambda: delivered(cache, np.arange(cache.n), options.batch),
        "ours, shuffled": lambda: delivered(cache, order(np.arange(cache.n)), options.batch),
        "ours, shuffled, by a thread": lambda: loaded(cache, order, options.batch),
    }
    rates = rates_of(cache.n, rows)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}, {cache.n} samples of 16 KiB")
    for name, value in rates.items():
        relative = value / rates["plain webdataset"]
        print(f"{name:28s}{value:10,.0f}/s   {value / rates['cat']:6.3f} of cat   {relative:6.1f} x webdataset")
    share = wait_share(cache, order, options.batch)
    print(f"beside a busy training at {BUSY_RATE:,} samples/s: {share:.2%} of the step is data wait")


if __name__ == "__main__":
    main()
