"""Which timestep each training sample is noised to, drawn by its position in the data stream (core/rng.py).

Neither rank nor micro batch has an influence. Knows no noise levels and no loss. Losses are told apart by ten equal
ranges of timesteps, in training and in validation alike.

Shape letters: B batch.
"""

from enum import Enum

from torch import Tensor

from ldm_scale.core import rng

BUCKETS = 10
"""Ranges of timesteps."""
_PURPOSE, _JITTER_BITS = "diffusion/timestep", 24


class TimestepDraw(Enum):
    """How the timesteps of a global batch are drawn; each timestep is equally likely in all of them."""

    uniform = "uniform"
    """Each sample on its own; Ho et al. 2020, algorithm 1."""
    stratified = "stratified"
    """One sample in each of as many equal ranges as the global batch has samples: the loss wanders less from batch to
    batch. As the low-discrepancy sampler of Kingma et al. 2021, but every sample has its own jitter."""


def draw_timesteps(draw: TimestepDraw, *, steps: int, seed: int, positions_B: Tensor, global_batch: int) -> Tensor:
    """Timesteps 0 .. steps - 1, (B,) int64, of the samples at these positions of the stream.

    global_batch  samples per optimizer step over all ranks; a batch begins at each multiple of it
    """
    if draw is TimestepDraw.uniform:
        return rng.integers(seed, _PURPOSE, positions_B, steps)
    # Data orders keep some samples to one place of every batch, so the ranges move on by one place each batch.
    range_B = (positions_B + positions_B // global_batch) % global_batch
    # In integers: a float near the end of the last range would round up to `steps`.
    place_B = (range_B << _JITTER_BITS) + rng.integers(seed, _PURPOSE, positions_B, 1 << _JITTER_BITS)
    return (place_B * steps // global_batch) >> _JITTER_BITS


def bucket_names(stem: str) -> list[str]:
    """`{stem}_t000` ... `{stem}_t900`: each range by where it begins, in thousandths."""
    return [f"{stem}_t{bucket * 1000 // BUCKETS:03d}" for bucket in range(BUCKETS)]


def bucket_width(steps: int) -> int:
    """Timesteps in each range; those left over belong to the last."""
    return steps // BUCKETS
