"""Batch arithmetic: a global batch cut into micro batches of equal size, on a given number of processes.

Pure. The user states global batch and micro batch (images per device and forward); gradient accumulation follows.
"""

from dataclasses import dataclass
from enum import Enum

_SHOWN = 12


class BatchFit(Enum):
    """What to do with a global batch that does not divide."""

    exact = "exact"
    """Refuse it and list what would fit."""
    nearest = "nearest"
    """Take the nearest global batch that fits, in smaller micro batches perhaps: losing a node must not end a run."""


@dataclass(frozen=True, slots=True)
class FittedBatch:
    """`global_batch = micro_batch * world * accumulation`."""

    global_batch: int
    """Images per optimizer step, over all processes."""
    micro_batch: int
    """Images per process and forward."""
    accumulation: int
    """Micro batches per process and optimizer step."""


def fit_batch(*, global_batch: int, micro_batch: int, world: int, fit: BatchFit = BatchFit.exact) -> FittedBatch:
    """Derive gradient accumulation.

    Fit nearest takes the micro batch that gives the nearest global batch: no larger than the stated one, and no smaller
    than half of it where a process has as many images.

    raises  ValueError where a size is below one, or (fit exact) where the batch does not divide, listing what would fit
    """
    for name, value in (("global_batch", global_batch), ("micro_batch", micro_batch)):
        if value < 1:
            raise ValueError(f"{name}={value}; must be at least 1")
    if global_batch % (micro_batch * world) and fit is BatchFit.exact:
        raise ValueError(_refusal(global_batch, micro_batch, world))
    largest = min(micro_batch, max(1, (2 * global_batch + world) // (2 * world)))
    fits = [_nearest(global_batch, size, world) for size in range(largest, (largest - 1) // 2, -1)]
    return min(fits, key=lambda fitted: abs(fitted.global_batch - global_batch))


def _nearest(global_batch: int, micro_batch: int, world: int) -> FittedBatch:
    stride = micro_batch * world
    accumulation = max(1, (2 * global_batch + stride) // (2 * stride))
    return FittedBatch(accumulation * stride, micro_batch, accumulation)


def divisors(n: int) -> list[int]:
    """Every divisor of `n`, ascending."""
    low = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _refusal(global_batch: int, micro_batch: int, world: int) -> str:
    stride = micro_batch * world
    below, above = global_batch // stride * stride, -(-global_batch // stride) * stride
    micro_batches = divisors(global_batch // world) if global_batch % world == 0 else []
    worlds = divisors(global_batch // micro_batch) if global_batch % micro_batch == 0 else []
    batches = [b for b in (below, above) if b > 0]
    return (
        f"global_batch={global_batch} does not divide into micro_batch={micro_batch} on {world} process(es). What "
        f"fits: micro_batch {_listed(micro_batches, micro_batch)}; processes {_listed(worlds, world)}; "
        f"global_batch {_listed(batches, global_batch)}. Or set batch_fit=nearest"
    )


def _listed(values: list[int], near: int) -> str:
    """The values nearest to `near`, ascending; "none" where there are none."""
    nearest = sorted(sorted(values, key=lambda value: abs(value - near))[:_SHOWN])
    return ", ".join(map(str, nearest)) or "none"
