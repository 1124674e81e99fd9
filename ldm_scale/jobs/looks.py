"""What a training looks at now and then: scores with each of its sets of weights, pictures with the averaged ones."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ldm_scale.core import runtime
from ldm_scale.jobs.kept import Between, Kept, forget
from ldm_scale.jobs.stages import Stage
from ldm_scale.tracking.tracker import Tracker
from ldm_scale.training.ema import half_life_of
from ldm_scale.training.loop import Evaluation

Put = Callable[[int | None], AbstractContextManager[None]]
"""Puts the average of a half-life, or (None) the raw weights, into the model while it lasts."""


class Looks:
    """Puts weights into the model for as long as it is looked at. Every call is collective."""

    def __init__(
        self,
        stage: Stage,
        put: Put,
        *,
        half_lives: Sequence[int],
        scored: Sequence[str],
        tracker: Tracker,
        between: Between,
        whose: Callable[[int | None], str],
        folder: Path,
    ) -> None:
        """Join a stage with its weights.

        half_lives  that `put` knows
        scored      weights that images are made with and scored: `ema`, `ema/H`, `raw`; the first one's scores have
                    plain names, the others' end in `_ema{H}` or `_raw`
        whose       tells the weights that `put` puts apart from all others
        folder      what an evaluation that is broken off has done, while it is under way
        """
        self._stage, self._put, self._half_lives, self._scored = stage, put, half_lives, list(scored)
        self._tracker, self._between, self._whose, self._folder = tracker, between, whose, folder

    def evaluate(self) -> list[Evaluation]:
        """Validation loss with all of `scored` and with the raw weights; the other scores with `scored`.

        Broken off and called again with the same weights, it goes on where it was.
        """
        found = [self._evaluation(weights) for weights in dict.fromkeys([*self._scored, "raw"])]
        if runtime.is_main():
            forget(self._folder)
        return [one for one in found if one.scores]

    def show(self, images_seen: int) -> None:
        """Pictures, by the averaged weights of the first half-life; of fixed captions, by the raw ones too."""
        drawn = {}
        for name, half_life in (("samples/prompts", self._half_lives[0]), ("samples/prompts_raw", None)):
            title = f"{'raw' if half_life is None else 'averaged'} weights after {images_seen:,} images"
            with self._model(half_life):
                drawn[name] = self._stage.prompted(title, self._between)
        with self._model(self._half_lives[0]):
            self._stage.show(images_seen, self._tracker, self._between)
        for name, picture in drawn.items():
            if picture is not None:
                self._tracker.images(images_seen, name, picture, "fixed captions by family, guidance 1, 3 and 7")

    def _evaluation(self, weights: str) -> Evaluation:
        suffix = "" if weights == self._scored[0] else f"_{weights.replace('/', '')}"
        half_life = half_life_of(weights, self._half_lives)
        with self._model(half_life):
            identity = {"weights": self._whose(half_life), **self._stage.identity()}
            kept = Kept(self._folder / weights.replace("/", ""), identity)
            scores = dict(kept.numbers("validation", lambda: self._stage.validate(self._between, suffix)))
            if weights in self._scored:
                found = self._stage.evaluate(self._between, kept)
                scores |= {f"{name}{suffix}": value for name, value in found.items()}
        described = "raw" if half_life is None else f"ema/{half_life}"
        return Evaluation(scores, {"weights": described, **self._stage.conditions()})

    @contextmanager
    def _model(self, half_life: int | None) -> Iterator[None]:
        """The model with these weights, and without dropout."""
        module = self._stage.module
        was_training = module.training
        with self._put(half_life):
            module.eval()
            try:
                yield
            finally:
                module.train(was_training)
