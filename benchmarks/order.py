"""What the order of the data costs at a resume, and how well it shuffles.

    python benchmarks/order.py [--samples 400000000] [--permutation 40000000]

Resume: from a checkpoint's state, as text, to the samples of the next global batch of 2,048 and the shards and places
where their keys lie; against numpy's permutation of so many samples as --permutation says, scaled to the whole set. The
best of several passes, each at another epoch, so that nothing is remembered.

Shuffle: of every attribute that is constant in a shard (language, source, year) the variance of a batch's mean, against
that of a batch of free draws: sum over shards of count^2 / batch. 1 + batch / shards is what free draws reach.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable

import numpy as np

from ldm_scale.data.mixture import Mixture, preset_mixture
from ldm_scale.data.order import Order, OrderPreset, preset_order

BATCH, SHARD = 2048, 10_000
PASSES = 7
BATCHES = 200  # of which the design effect is measured
RESUME_LIMIT_MS, EFFECT_LIMIT = 50.0, 1.6


def best_ms(work: Callable[[int], object]) -> float:
    """Milliseconds of the best of several passes; `work` is told which pass it is."""
    seconds = []
    for i in range(PASSES):
        began = time.perf_counter()
        work(i)
        seconds.append(time.perf_counter() - began)
    return 1e3 * min(seconds)


def order_resumed(text: str, n: int) -> Callable[[int], object]:
    """Shards and places of the next global batch, from a checkpoint's state, in some epoch."""
    starts = np.append(np.arange(0, n, SHARD), n)

    def work(epoch: int) -> object:
        position = epoch * n + n // 3
        ids = Order.from_state(json.loads(text))(np.arange(position, position + BATCH))
        shards = np.searchsorted(starts, ids, side="right") - 1
        return shards, ids - starts[shards]

    return work


def mixture_resumed(text: str, n: int) -> Callable[[int], object]:
    """The same of a mixture: sources and samples."""

    def work(epoch: int) -> object:
        position = epoch * n + n // 3
        return Mixture.from_state(json.loads(text))(np.arange(position, position + BATCH))

    return work


def batches_of(order: Order) -> Callable[[int], np.ndarray]:
    """Samples of a batch by its number."""
    return lambda number: order(np.arange(number * BATCH, (number + 1) * BATCH))


def design_effects(ids_of: Callable[[int], np.ndarray]) -> np.ndarray:
    """Design effect of each of some batches; `ids_of` gives a batch's samples by its number."""
    effects = []
    for number in np.random.default_rng(0).integers(0, 10_000_000, BATCHES).tolist():
        counts = np.unique(ids_of(number) // SHARD, return_counts=True)[1]
        effects.append((counts**2).sum() / BATCH)
    return np.array(effects)


def print_resume(n: int, permutation: int) -> None:
    """One line for each preset, one for a mixture, and what a stored permutation would cost."""
    stored = best_ms(lambda i: np.random.default_rng(i).permutation(permutation)) * n / permutation
    print(f"resume at {n:,} samples to the places of the first {BATCH:,} keys (limit {RESUME_LIMIT_MS:.0f} ms)")
    rows = {p.name: order_resumed(json.dumps(preset_order(p, n=n, seed=1).state()), n) for p in OrderPreset}
    sizes = [n * 7 // 10, n * 2 // 10, n // 10]
    mixed = json.dumps(preset_mixture(OrderPreset.window, sizes=sizes, weights=[0.5, 0.3, 0.2], seed=1).state())
    rows["three sources, window"] = mixture_resumed(mixed, n)
    for name, work in rows.items():
        took = best_ms(work)
        verdict = "met" if took <= RESUME_LIMIT_MS else "MISSED"
        print(f"  {name:24s} {took:9.2f} ms  {verdict:6s}  1/{stored / took:,.0f} of a permutation")
    print(f"  numpy's permutation      {stored:9.0f} ms  scaled from {permutation:,}; {8 * n / 1e9:.1f} GB")


def print_shuffle(n: int) -> None:
    """One line for each preset, and one for free draws."""
    print(f"design effect in batches of {BATCH:,}, shards of {SHARD:,} (limit {EFFECT_LIMIT})")
    free = np.random.default_rng(1)
    rows: dict[str, Callable[[int], np.ndarray]] = {"free draws": lambda number: free.integers(0, n, BATCH)}
    rows |= {preset.name: batches_of(preset_order(preset, n=n, seed=1)) for preset in OrderPreset}
    for name, ids_of in rows.items():
        effects = design_effects(ids_of)
        verdict = "met" if effects.max() <= EFFECT_LIMIT else "MISSED"
        print(f"  {name:24s} mean {effects.mean():5.2f}  worst of {BATCHES} {effects.max():5.2f}  {verdict}")


def main() -> None:
    """Print the machine, then both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400_000_000)
    parser.add_argument("--permutation", type=int, default=40_000_000)
    options = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    print_resume(options.samples, options.permutation)
    print_shuffle(options.samples)


if __name__ == "__main__":
    main()
