"""What an experiment file may say: the part of a job's configuration that all stages of an experiment share."""

from dataclasses import dataclass, field
from enum import Enum

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.data.config import DataConfig
from ldm_scale.data.samples import Task
from ldm_scale.evaluation.statistics import Score
from ldm_scale.first_stage.base import FirstStageConfig
from ldm_scale.first_stage.loss import AutoencoderLossConfig
from ldm_scale.latent_diffusion.model import DiffusionConfig, LatentDiffusionConfig
from ldm_scale.nn.unet import UNetConfig
from ldm_scale.samplers.base import SamplerConfig
from ldm_scale.tracking.tracker import TrackerConfig
from ldm_scale.training.ema import half_life_of
from ldm_scale.training.engine import BatchFit, EngineConfig
from ldm_scale.training.optimizer import OptimizerConfig


class FeatureNetwork(Enum):
    """The network whose features are compared."""

    random = "random"
    """A fixed random-weight network: needs no download, logs `fd_random`."""
    inception = "inception"
    """Inception v3 of the FID paper, from `paths.weights`; logs `fid`. First stages log `lpips` too, by VGG16 there."""
    inception_clean = "inception_clean"
    """The same on images resized as clean-fid does; logs `fid_clean`."""
    vgg16 = "vgg16"
    """VGG-16, from `paths.weights`: precision and recall as first published; logs `precision_vgg16`, `recall_vgg16`."""


@dataclass(kw_only=True, slots=True)
class PathsConfig:
    """Where things lie that no run owns."""

    weights: str
    """Directory of downloaded weights (first stages, Inception, VGG, tokenizers)."""


@dataclass(kw_only=True, slots=True)
class EveryConfig:
    """How often the training loop does what; all in images seen, 0 for never."""

    log: int
    """Numbers to the tracker."""
    sample: int
    """Grids of fixed prompts and fixed noise (second stage) or reconstructions (first stage)."""
    evaluate: int
    """Validation loss and scores."""
    save: int
    """Checkpoints."""

    def __post_init__(self) -> None:
        for name in ("log", "sample", "evaluate", "save"):
            if getattr(self, name) < 0:
                raise ValueError(f"every.{name}={getattr(self, name)}; a number of images, or 0 for never")


PROMPT_GUIDANCES = (1.0, 3.0, 7.0)
"""Strengths of guidance that fixed captions are drawn at: none, usual, strong."""


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Scores in training and after it."""

    images: int
    """How many images are generated (second stage) or reconstructed (first stage) for a score."""
    batch: int
    """Images made at once, per process."""
    features: FeatureNetwork
    """The network that looks at images."""
    scores: list[Score]
    """What generated and real images are compared by."""
    weights: list[str]
    """Which weights images are made with: `ema`, `ema/H`, `raw`. Each costs a score of its own."""
    reference: str | None
    """File of a reference set's statistics (`evaluate.py write_reference=FILE`); None takes the held-out images."""
    clip: str | None
    """Directory of a CLIP, for the CLIP score; None for no such score."""
    caption_accuracy: bool
    """Read colour, shape and position back from generated pictures; true in the toy world only."""
    grid: int
    """Pictures in a sample grid."""
    prompts: dict[str, list[str]] = field(default_factory=dict)
    """Captions by family (count, colour, text, rare): drawn beside the grid with averaged and with raw weights, at each
    of PROMPT_GUIDANCES; {} for none."""

    def __post_init__(self) -> None:
        for name in ("images", "batch", "grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name}={getattr(self, name)}; at least 1")
        if not self.weights:
            raise ValueError("evaluation.weights=[]; give at least one of ema, ema/H, raw")
        if empty := [family for family, captions in self.prompts.items() if not captions]:
            raise ValueError(f"evaluation.prompts.{empty[0]}=[]; give a caption, or leave the family out")


@dataclass(kw_only=True, slots=True)
class Experiment:
    """Everything an experiment file may set; every job of the experiment reads its part."""

    experiment: str
    """Name of the file in conf/experiment."""
    name: str
    """Name of this run of the experiment; mandatory at full scale."""
    run_dir: str
    """Where the run writes; `runs/{experiment}/{name}` unless given."""
    seed: int
    """Of every random stream: order of the data, noise, timesteps, dropout, initial weights."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before the configuration is composed: they register parts from outside this tree."""

    first_stage: FirstStageConfig
    """Autoencoder between pixels and latents; trained where there is no `unet`, else frozen."""
    autoencoder_loss: AutoencoderLossConfig
    """What a first stage is trained on."""
    unet: UNetConfig | None = None
    """Denoiser; None trains the first stage itself."""
    conditioning: ConditionerConfig | None = None
    """What the denoiser is told; None for an unconditional model."""
    diffusion: DiffusionConfig | None = None
    """Schedule and objective; None where there is no `unet`."""
    sampler: SamplerConfig
    """How sample grids and scores are made."""

    data: DataConfig
    """Image shards, latent cache, transform."""
    engine: EngineConfig
    """How processes train together."""
    optimizer: OptimizerConfig
    """Updates, and the learning rate as a function of images."""
    evaluation: EvaluationConfig
    """Scores."""
    tracker: TrackerConfig
    """Where numbers and pictures go besides the run directory."""
    paths: PathsConfig
    """Where things lie that no run owns."""
    every: EveryConfig
    """Intervals of the training loop."""

    global_batch: int
    """Images per optimizer step, over all devices."""
    micro_batch: int
    """Images per device and forward pass; accumulation is derived."""
    batch_fit: BatchFit = BatchFit.exact
    """`nearest` takes the nearest global batch that fits the world, instead of refusing."""
    total_images: int
    """Training ends when this many images have been seen."""
    ema_half_lives: list[int]
    """Half-lives of the weight averages, in images; the first is the one sampled and exported."""
    keep_last: int = 3
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many images are kept for good; 0 for none."""
    max_unsaved_minutes: float = 60.0
    """How long saves may fail (disk full, I/O) while training goes on and tries again; then it ends as failed. Below
    `guard.phase_minutes`."""

    def __post_init__(self) -> None:
        for name in ("global_batch", "micro_batch", "total_images", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; at least 1")
        if self.max_unsaved_minutes < 0:
            raise ValueError(f"max_unsaved_minutes={self.max_unsaved_minutes}; at least 0")
        if not self.ema_half_lives or min(self.ema_half_lives) < 1:
            raise ValueError(f"ema_half_lives={self.ema_half_lives}; at least one, each at least 1 image")
        for which in self.evaluation.weights:
            half_life_of(which, self.ema_half_lives)
        if (self.unet is None) != (self.diffusion is None):
            raise ValueError("unet and diffusion go together: a second stage has both, a first stage neither")
        if self.unet is not None and self.unet.out_channels != self.first_stage.latent_channels:
            raise ValueError(
                f"unet.out_channels={self.unet.out_channels}, but latents of this first stage have "
                f"{self.first_stage.latent_channels} channels: make them equal"
            )
        if self.unet is None and self.conditioning is not None:
            raise ValueError("conditioning is given but there is no unet for it to condition")

    @property
    def prompts(self) -> dict[str, list[str]]:
        """`evaluation.prompts`, of a model that reads captions; none of any other."""
        return self.evaluation.prompts if self.data.task is Task.text else {}

    @property
    def trains_first_stage(self) -> bool:
        """True where the job trains the autoencoder rather than a diffusion model on it."""
        return self.unet is None

    @property
    def latent_diffusion(self) -> LatentDiffusionConfig:
        """The second stage of this experiment."""
        assert self.unet is not None and self.diffusion is not None, "asked only where there is a second stage"
        return LatentDiffusionConfig(unet=self.unet, conditioning=self.conditioning, diffusion=self.diffusion)
