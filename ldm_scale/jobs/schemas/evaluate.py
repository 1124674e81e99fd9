"""The configuration of `evaluate.py`."""

from dataclasses import dataclass, field

from ldm_scale.evaluation.statistics import Score
from ldm_scale.jobs.schemas.drawing import Drawing
from ldm_scale.jobs.schemas.experiment import EvaluationConfig


@dataclass(kw_only=True, slots=True)
class GivenFirstStage:
    """A first stage to score that no run of ours need have trained; its config.json says what it is."""

    checkpoint: str | None = None
    """Directory of weights, or of a training run whose published weights are meant."""


@dataclass(kw_only=True, slots=True)
class EvaluatedData:
    """The images that scores are about."""

    images: str | None = None
    """Image shards; None for the held-out ones that the run was configured with."""
    size: int | None = None
    """Side that first stages are scored at, pixels; None: as in training."""


@dataclass(kw_only=True, slots=True)
class EvaluateJob(Drawing):
    """`evaluate.py`."""

    run_dir: str | None = None
    """The run directory of a training, of a first or second stage."""
    first_stage: GivenFirstStage = field(default_factory=GivenFirstStage)
    """Instead of `run_dir`: a first stage."""
    watch: str | None = None
    """Instead of `run_dir`: a training whose checkpoints are scored as they appear, with its own settings."""
    every: int = 0
    """With `watch`, images: one checkpoint is scored in each stretch of so many; 0: all that are seen in time."""
    evaluation: EvaluationConfig
    """Scores."""
    data: EvaluatedData = field(default_factory=EvaluatedData)
    """On which images."""
    guidances: list[float] = field(default_factory=list)
    """Of a second stage: strengths of guidance to score and draw, distance against alignment; []: the sampler's own."""
    write_reference: str | None = None
    """Instead of scores: write the statistics of `data.images`, all of them, for `evaluation.reference`."""

    def __post_init__(self) -> None:
        Drawing.__post_init__(self)
        checkpoint = self.first_stage.checkpoint
        self._require_axes()
        if self.write_reference is not None:
            unknown = self.run_dir is None and None in (self.data.images, self.data.size)
            if unknown or checkpoint is not None or self.watch is not None:
                raise ValueError(
                    f"write_reference={self.write_reference} prepares images as a run does, or at a size in the usual "
                    "way: run_dir=RUN, or data.images=SHARDS_OR_FOLDER and data.size=PIXELS"
                )
            return
        if [self.run_dir, checkpoint, self.watch].count(None) != 2:
            raise ValueError("name what to score by one of run_dir=RUN, first_stage.checkpoint=DIRECTORY, watch=RUN")
        if self.every < 0 or (self.every and self.watch is None):
            raise ValueError(f"every={self.every}: images between two checkpoints that watch=RUN scores; 0 for all")
        if checkpoint is not None and (self.data.images is None or self.data.size is None):
            raise ValueError(
                f"first_stage.checkpoint={checkpoint} needs data.images=SHARDS and data.size=PIXELS beside it"
            )
        if checkpoint is not None and (self.checkpoint, self.weights) != ("latest", "ema"):
            raise ValueError("checkpoint= and weights= choose within run_dir=; first_stage.checkpoint= holds one set")

    def _require_axes(self) -> None:
        if self.guidances and self.run_dir is None:
            raise ValueError(f"guidances={self.guidances} are strengths to score one checkpoint at: run_dir=RUN")
        aligned = self.evaluation.clip is not None or self.evaluation.caption_accuracy
        if self.guidances and not (aligned and Score.frechet in self.evaluation.scores):
            raise ValueError(
                f"guidances={self.guidances} draws a distance against alignment: it needs frechet in evaluation.scores "
                "and evaluation.clip=DIRECTORY (or in the toy world evaluation.caption_accuracy=true)"
            )
