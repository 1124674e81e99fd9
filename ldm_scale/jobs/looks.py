"""What a training looks at now and then: scores with each of its sets of weights, pictures with the averaged ones."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from ldm_scale.jobs.scores import Between
from ldm_scale.jobs.stages import Stage
from ldm_scale.tracking.tracker import Tracker
from ldm_scale.training.ema import EMA, half_life_of
from ldm_scale.training.loop import Evaluation


class Looks:
    """Puts weights into the model for as long as it is looked at. Every call is collective."""

    def __init__(self, stage: Stage, ema: EMA, scored: Sequence[str], tracker: Tracker, between: Between) -> None:
        """Join a stage with its averages.

        scored  weights that images are made with and scored: `ema`, `ema/H`, `raw`; the first one's scores have plain
                names, the others' end in `_ema{H}` or `_raw`
        """
        self._stage, self._ema, self._scored = stage, ema, list(scored)
        self._tracker, self._between = tracker, between

    def evaluate(self) -> list[Evaluation]:
        """Validation loss with all of `scored` and with the raw weights; the other scores with `scored`."""
        found = [self._evaluation(weights) for weights in dict.fromkeys([*self._scored, "raw"])]
        return [one for one in found if one.scores]

    def show(self, images_seen: int) -> None:
        """Pictures, by the averaged weights of the first half-life."""
        with self._put("ema"):
            self._stage.show(images_seen, self._tracker, self._between)

    def _evaluation(self, weights: str) -> Evaluation:
        suffix = "" if weights == self._scored[0] else f"_{weights.replace('/', '')}"
        with self._put(weights):
            scores = self._stage.validate(self._between, suffix)
            if weights in self._scored:
                found = self._stage.evaluate(self._between)
                scores |= {f"{name}{suffix}": value for name, value in found.items()}
        half_life = self._half_life(weights)
        described = "raw" if half_life is None else f"ema/{half_life}"
        return Evaluation(scores, {"weights": described, **self._stage.conditions()})

    def _put(self, weights: str) -> AbstractContextManager[None]:
        half_life = self._half_life(weights)
        return nullcontext() if half_life is None else self._ema.swapped(half_life)

    def _half_life(self, weights: str) -> int | None:
        return half_life_of(weights, list(self._ema.shadows))
