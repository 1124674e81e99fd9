"""Named random streams: a draw depends on (seed, purpose, position) and on nothing else.

`position` is the place of a sample in the training stream (or the index of a prompt, or of an image). Rank, world size,
micro batch, device and the draws made before it have no influence, so a resumed or resized job draws the same numbers.
The generator is counter-based: a 64-bit hash (the finaliser of SplitMix64, Steele et al. 2014, applied twice) of the
stream's key, the position and the element, in integer tensor operations that are exact on every device.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as a signed 64-bit number
_WEYL = 0xD1B54A32D192ED03 - (1 << 64)  # another odd constant, so that positions and elements never share a sequence
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def stream_key(seed: int, purpose: str) -> int:
    """The signed 64-bit key of one named stream."""
    name = f"{seed}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little", signed=True)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The hash of each word, in its place."""
    x ^= _shift(x, 30)
    x *= _MIX_1
    x ^= _shift(x, 27)
    x *= _MIX_2
    x ^= _shift(x, 31)
    return x


def _bits(seed: int, purpose: str, positions_B: Tensor, count: int) -> Tensor:
    """(B, count) independent 64-bit words."""
    per_position = _mix(positions_B.to(torch.int64) * _GOLDEN + stream_key(seed, purpose))
    elements = torch.arange(1, count + 1, device=positions_B.device, dtype=torch.int64) * _WEYL
    return _mix(_mix(per_position[:, None] + elements))


def uniform(seed: int, purpose: str, positions_B: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Uniform numbers in [0, 1), float32, shape (B, *shape); 24 random bits each."""
    words = _bits(seed, purpose, positions_B, math.prod(shape))
    return (_shift(words, 40).to(torch.float32) * 2.0**-24).reshape(len(positions_B), *shape)


def integers(seed: int, purpose: str, positions_B: Tensor, high: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Integers uniform in 0 .. high - 1, int64, shape (B, *shape); `high` up to 2^31."""
    assert 1 <= high <= 1 << 31, high
    words = _shift(_bits(seed, purpose, positions_B, math.prod(shape)), 33)
    return ((words * high) >> 31).reshape(len(positions_B), *shape)


def normal(seed: int, purpose: str, positions_B: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """Standard normal numbers, float32, shape (B, *shape); Box & Muller 1958, both of each pair used."""
    count = math.prod(shape)
    words = _bits(seed, purpose, positions_B, (count + 1) // 2)
    radius = _shift(words, 40).add_(1).to(torch.float32).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = words.bitwise_and_(0xFFFFFF).to(torch.float32).mul_(2 * math.pi * 2.0**-24)
    pairs = torch.stack((radius * angle.cos(), radius.mul_(angle.sin_())), dim=-1).flatten(1)
    return pairs[:, :count].reshape(len(positions_B), *shape)


def text_uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: for splits that no run and no order can move."""
    word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return (word >> 11) / 2**53  # 53 bits fit a float: 1.0 cannot come out
