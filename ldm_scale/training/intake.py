"""What a training gives its model: samples of a batch, to be looked at; and how all since the last log line were.

Taken where the model is called, so that whatever went wrong on the way there shows. Nothing waits for the device.

Shape letters: B batch, C channels, H W height and width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioner
from ldm_scale.training.masters import Ratio


@dataclass(frozen=True, slots=True)
class Spread:
    """Of latents as the model is given them: scaled."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Given:
    """Samples as a model was given them.

    samples   (B, C, H, W) latents, scaled and without noise; or images of a first stage
    told      (B, ...) conditioning inputs, some of them dropped; None for a model that is told nothing
    captions  what the inputs were made of, before any was dropped
    """

    samples: Tensor
    told: Tensor | None
    captions: list[str]
    keys: list[str]

    def first(self, count: int) -> "Given":
        """Copies of the first `count`: loaders fill their memory anew."""
        told = None if self.told is None else self.told[:count].clone()
        return Given(self.samples[:count].detach().clone(), told, self.captions[:count], self.keys[:count])


class Intake:
    """Of this rank, since the training was launched."""

    def __init__(self, *, shown: int, expected: Spread | None = None, conditioner: Conditioner | None = None) -> None:
        """Begin with nothing.

        shown        samples that are kept of a global batch, at most
        expected     what was measured of the latents; None where samples are none
        conditioner  of the model, which knows what its inputs say
        """
        self._shown, self._spread, self._conditioner = shown, expected, conditioner
        self._watching = False
        self._newest: list[Given] = []
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def watch(self, on: bool) -> None:
        """Whether samples of the global batch that begins are kept, in place of those before: it takes copies."""
        self._watching = on
        if on:
            self._newest = []

    def take(self, given: Given, inputs: Tensor | None) -> None:
        """One micro batch is given to the model; `inputs` are its conditioning inputs before any was dropped."""
        values: dict[str, Tensor] = {}
        if self._spread is not None:
            values["data/latent_mean"] = given.samples.mean()
            values["data/latent_std"] = (given.samples - self._spread.mean).square().mean()
        if self._conditioner is not None and inputs is not None:
            lengths = self._conditioner.lengths(inputs)
            values |= {f"data/caption_{name}": of_B.float().mean() for name, of_B in lengths.items()}
        self._sums = {name: self._sums.get(name, 0) + value.detach() for name, value in values.items()}
        self._count += 1
        room = self._shown - sum(len(one.keys) for one in self._newest)
        if self._watching and room > 0:
            self._newest.append(given.first(room))

    def newest(self) -> Given | None:
        """The samples that are kept; None before the first."""
        if not self._newest:
            return None
        told = [one.told for one in self._newest if one.told is not None]
        return Given(
            torch.cat([one.samples for one in self._newest]),
            torch.cat(told) if told else None,
            [caption for one in self._newest for caption in one.captions],
            [key for one in self._newest for key in one.keys],
        )

    def since_last_line(self) -> tuple[dict[str, Ratio], dict[str, Ratio]]:
        """Means over all that was given since this was last called, and means of squares, whose roots are told.

        `data/latent_std` is the root mean square distance from the mean that was expected; `data/caption_truncated` is
        of the captions that were read meanwhile, some of them ahead.
        """
        count = torch.tensor(float(self._count))
        found = {name: (total, count) for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        if self._conditioner is not None:
            cut, read = self._conditioner.cut()
            found["data/caption_truncated"] = torch.tensor(float(cut)), torch.tensor(float(read))
        squares = {name: found.pop(name) for name in ("data/latent_std",) if name in found}
        return found, squares

    def expected(self) -> dict[str, float]:
        """What the latents are held against."""
        if self._spread is None:
            return {}
        return {"data/latent_mean_expected": self._spread.mean, "data/latent_std_expected": self._spread.std}
