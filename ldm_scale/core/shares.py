"""Work in many parts, shared by all ranks, and its sums over them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from ldm_scale.core import runtime

Part = TypeVar("Part")


def ranges(count: int, size: int) -> list[range]:
    """0 .. `count` - 1 in consecutive ranges of `size`; the last may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def shared(parts: Sequence[Part]) -> Iterator[tuple[Part, bool]]:
    """The parts of this rank, as many as every other rank's, so that collective calls in between meet each other.

    Where parts run out, a rank is given another's along with it: False says that it does not count. What is in a part
    does not depend on the world, and so neither does what is computed from it.
    """
    for start in range(0, len(parts), runtime.world()):
        own = start + runtime.rank()
        yield (parts[own], True) if own < len(parts) else (parts[start], False)


def own(parts: Sequence[Part]) -> Sequence[Part]:
    """The parts of this rank alone, where nothing in between is collective."""
    return parts[runtime.rank() :: runtime.world()]


def from_main(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, on the device of the job, by rank 0's. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all ranks. Collective."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    for tensor in tensors:
        total = tensor.to(runtime.device())
        dist.all_reduce(total)
        tensor.copy_(total)
