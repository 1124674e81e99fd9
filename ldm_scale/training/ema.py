"""Exponential moving averages of the float32 masters, several half-lives at once, in images.

Shadows lie beside the masters of each rank (whole under DDP, partitions under ZeRO), so an update needs no
communication. Knows no engine, no file and no schedule.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from ldm_scale.core import runtime
from ldm_scale.training.masters import Masters, Ratio, chunked, laid_out, share, square_sum

RAMP = 0.05


class EMA:
    """Averages that forget half of the past every `half_life` images.

    Early in a run the average must not cling to the random initial weights: the half-life in force is
    min(half_life, RAMP * images seen), as in the code of Karras et al. 2022 (EDM, `ema_rampup_ratio` 0.05).
    """

    def __init__(self, masters: Masters, half_lives: Sequence[int]) -> None:
        """Start at the current weights.

        half_lives  in images, each at least 1 and given once
        """
        if any(half_life < 1 for half_life in half_lives) or len(set(half_lives)) != len(half_lives):
            raise ValueError(f"ema_half_lives={list(half_lives)}; each must be at least 1 image and given once")
        self._masters = masters
        self.shadows: dict[int, list[Tensor]] = {
            half_life: [master.detach().clone() for master in masters.tensors] for half_life in half_lives
        }
        """Float32 tensors aligned with the masters, by half-life."""
        assert all(t.dtype == torch.float32 for shadow in self.shadows.values() for t in shadow)
        mine = share(masters, runtime.rank(), runtime.world())
        self._chunks = [
            [laid_out(tensors, pieces) for tensors in (masters.tensors, *self.shadows.values())]
            for pieces in chunked(mine, masters.tensors[0].device)
        ]

    def reset(self) -> None:
        """Start again at the current weights."""
        with torch.no_grad():
            for shadow in self.shadows.values():
                torch._foreach_copy_(shadow, self._current())

    @torch.no_grad()
    def update(self, images: int, images_seen: int) -> None:
        """Take one optimizer step's weights in.

        images       images of that step
        images_seen  images of the run, that step's included
        """
        for half_life, shadow in self.shadows.items():
            torch._foreach_lerp_(shadow, self._current(), 1 - decay(half_life, images, images_seen))

    @contextmanager
    def swapped(self, half_life: int) -> Iterator[None]:
        """The model has averaged weights inside, and exactly its own again afterwards. Collective.

        After an error it keeps the averaged ones, and training is over: other ranks may not have met it, and to put the
        own ones back is collective.
        """
        own = [master.detach().clone() for master in self._masters.tensors]
        self._masters.push(self.shadows[half_life])
        try:
            yield
        except runtime.Preempted:  # by all ranks together
            self._masters.push(own)
            raise
        self._masters.push(own)

    def consolidated(self, half_life: int) -> dict[str, Tensor] | None:
        """Whole averaged tensors by parameter name, float32 on the CPU, on rank 0; None elsewhere. Collective."""
        return self._masters.consolidated(self.shadows[half_life])

    def distances(self) -> dict[int, Ratio]:
        """The square of |average - weights| / |weights| over the whole model by half-life: this rank's part of it.

        Zero for long means that an average is dead.
        """
        zero = torch.zeros((), device=self._masters.tensors[0].device)
        whole, apart = zero, dict.fromkeys(self.shadows, zero)
        for chunk in self._chunks:
            weights, *averages = (torch.cat(views) for views in chunk)
            whole = whole + square_sum(weights)
            for half_life, average in zip(apart, averages, strict=True):
                apart[half_life] = apart[half_life] + square_sum(average.sub_(weights))
        return {half_life: (square, whole) for half_life, square in apart.items()}

    def put(self, half_life: int | None) -> AbstractContextManager[None]:
        """As `swapped`; None leaves the model its own weights."""
        return nullcontext() if half_life is None else self.swapped(half_life)

    def checksum(self, half_life: int | None) -> str:
        """Tells the weights that `put` puts apart from all others. Collective."""
        tensors = self._masters.tensors if half_life is None else self.shadows[half_life]
        return self._masters.checksum(tensors)

    def _current(self) -> list[Tensor]:
        return [master.detach() for master in self._masters.tensors]


def half_life_of(weights: str, half_lives: Sequence[int]) -> int | None:
    """The half-life whose average `ema` (the first one) or `ema/H` means; None for `raw`.

    raises  ValueError where there is none such
    """
    if weights == "raw":
        return None
    name = f"ema/{half_lives[0]}" if weights == "ema" else weights
    found = {f"ema/{half_life}": half_life for half_life in half_lives}
    if name not in found:
        raise ValueError(f"weights={weights!r}; there are raw, ema (which is ema/{half_lives[0]}), {', '.join(found)}")
    return found[name]


def decay(half_life: int, images: int, images_seen: int) -> float:
    """Weight of the old average in one update of `images` images, ramp included."""
    return float(0.5 ** (images / min(half_life, RAMP * images_seen)))
