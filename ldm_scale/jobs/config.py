"""What a job is: one schema per job, made of dataclasses that stand beside their owners. The only importer of Hydra.

A configuration travels four roads (a group file, an experiment, `key=`, `+key=`), and on each an unknown key, a wrong
type or an impossible value is refused before anything is loaded, by the schemas registered here.
"""

import dataclasses
import difflib
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.config import DataConfig, Origin
from ldm_scale.evaluation.statistics import Score
from ldm_scale.first_stage.base import FirstStageConfig
from ldm_scale.first_stage.identity import IdentityConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig, Rescale
from ldm_scale.first_stage.loss import AutoencoderLossConfig
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.latent_diffusion.model import DiffusionConfig, LatentDiffusionConfig
from ldm_scale.latent_diffusion.tiles import Tiles
from ldm_scale.nn.unet import UNetConfig
from ldm_scale.samplers.base import SamplerConfig
from ldm_scale.samplers.ddim import DDIMConfig
from ldm_scale.samplers.ddpm import DDPMConfig
from ldm_scale.samplers.dpm_solver import DPMSolverConfig
from ldm_scale.samplers.plms import PLMSConfig
from ldm_scale.tracking.tracker import TrackerConfig
from ldm_scale.training.ema import half_life_of
from ldm_scale.training.engine import BatchFit, EngineConfig, EngineKind
from ldm_scale.training.guards import GuardConfig
from ldm_scale.training.optimizer import OptimizerConfig

CONF = Path(__file__).parents[2] / "conf"
REFUSED_EXIT_CODE = 2
Job = TypeVar("Job")


class Features(Enum):
    """The network whose features are compared."""

    random = "random"
    """A fixed random-weight network: needs no download, logs `fd_random`."""
    inception = "inception"
    """Inception v3 of the FID paper, from `paths.weights`; logs `fid`. First stages log `lpips` too, by VGG16 there."""
    inception_clean = "inception_clean"
    """The same on images resized as clean-fid does; logs `fid_clean`."""


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


@dataclass(kw_only=True, slots=True)
class EvaluationConfig:
    """Scores in training and after it."""

    images: int
    """How many images are generated (second stage) or reconstructed (first stage) for a score."""
    batch: int
    """Images made at once, per process."""
    features: Features
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

    def __post_init__(self) -> None:
        for name in ("images", "batch", "grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"evaluation.{name}={getattr(self, name)}; at least 1")
        if not self.weights:
            raise ValueError("evaluation.weights=[]; give at least one of ema, ema/H, raw")


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
    """How long saves may fail (disk full, quota) while training goes on and tries again; then it ends as failed."""

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
    def trains_first_stage(self) -> bool:
        """True where the job trains the autoencoder rather than a diffusion model on it."""
        return self.unet is None

    @property
    def latent_diffusion(self) -> LatentDiffusionConfig:
        """The second stage of this experiment."""
        assert self.unet is not None and self.diffusion is not None, "asked only where there is a second stage"
        return LatentDiffusionConfig(unet=self.unet, conditioning=self.conditioning, diffusion=self.diffusion)


_UNTRAINED_CONDITIONERS = (ClassLabelConfig, ConcatConfig, LabelMapConfig, LayoutConfig)


class InitWhat(Enum):
    """What a new run takes from the one it branches from."""

    weights = "weights"
    """The weights; moments and averages start anew."""
    ema = "ema"
    """The averaged weights (of the parent's first half-life) as weights; the rest starts anew."""
    all = "all"
    """Weights, moments, averages and images seen: another configuration from here on."""


@dataclass(kw_only=True, slots=True)
class TrainJob(Experiment):
    """`train.py`."""

    init: str | None = None
    """What a new run starts from instead of fresh weights: a training run, one of its checkpoints, or a model directory
    that `ldm_scale.interop` wrote. Its parent is recorded; a run that has a checkpoint goes on from that."""
    init_what: InitWhat = InitWhat.weights
    """What is taken from `init`."""

    guard: GuardConfig = field(default_factory=GuardConfig)
    """What is done about losses that are no number, spikes and hangs."""

    amend: bool = False
    """Allow a resume under a changed learning rate, batch, data or length; the difference is recorded."""

    def __post_init__(self) -> None:
        Experiment.__post_init__(self)
        self.optimizer.learning_rate_at(0, self.total_images)  # refuses a schedule that the run is too short for
        if self.trains_first_stage and isinstance(self.first_stage, IdentityConfig):
            raise ValueError(
                "first_stage=identity cannot be trained: it has no weights. Others can: +experiment=autoencoder_kl_f4"
            )
        trains_codebook = self.trains_first_stage and isinstance(self.first_stage, AutoencoderVQConfig)
        if trains_codebook and self.engine.kind is EngineKind.zero3:
            raise ValueError("engine.kind=zero3 gathers weights layer by layer, and a codebook is none: engine=ddp")
        if trains_codebook and self.autoencoder_loss.restart_codes and self.engine.kind.zero_stage:
            raise ValueError(
                f"autoencoder_loss.restart_codes=true with engine.kind={self.engine.kind.value}, which cuts the "
                "codebook up between ranks: choose engine=ddp, or restart_codes=false"
            )
        if self.trains_first_stage:
            _require_room_beside(self.engine, self.autoencoder_loss)
            self.autoencoder_loss.adversarial.require_fits(self.data.transform.size)
        if type(self.conditioning) in _UNTRAINED_CONDITIONERS:
            raise ValueError(
                f"conditioning={_kind_of(self.conditioning)} cannot be trained yet: batches carry no other condition "
                "than captions for a text_transformer or a clip_text. These can: +experiment=txt2img_laion, "
                "+experiment=uncond_lsun_churches"
            )
        if isinstance(self.conditioning, ClipTextConfig):
            _require_own_captions(self.data)
        rescale = self.first_stage.rescale if isinstance(self.first_stage, AutoencoderKLConfig) else Rescale.all
        if self.trains_first_stage and rescale is not Rescale.all:
            raise ValueError("first_stage.rescale=channels is for a second stage; this job trains the first one")
        if self.init is None and self.init_what is not InitWhat.weights:
            raise ValueError(f"init_what={self.init_what.name} without init=RUN: say what to start from")
        if self.trains_first_stage and self.first_stage.checkpoint is not None:
            raise ValueError(
                f"first_stage.checkpoint={self.first_stage.checkpoint}, but this job trains a first stage: "
                f"init={self.first_stage.checkpoint} starts it from those weights"
            )


def _require_room_beside(engine: EngineConfig, loss: AutoencoderLossConfig) -> None:
    """For what learns beside a first stage: only engines that hold everything on every process have room for it.

    raises  ValueError naming the keys
    """
    for key, learns in (("adversarial.kind", loss.adversarial.exists), ("learn_variance", loss.learn_variance)):
        if learns and engine.kind.zero_stage:
            raise ValueError(
                f"engine.kind={engine.kind.name} trains one network, and autoencoder_loss.{key} brings another that "
                "learns beside it: engine=ddp, which first stages are small enough for (one_process on one GPU)"
            )


def _require_own_captions(data: DataConfig) -> None:
    """For a frozen text encoder: its output is cached, of the captions that the images came with.

    raises  ValueError naming the key
    """
    why = "conditioning=clip_text trains on embeddings that a latent cache holds of its own captions"
    if data.source is Origin.images:
        raise ValueError(f"data.source=images, but {why}: data.source=latents")
    for name, part in {"data": data, **{f"data.mixture.{key}": part for key, part in data.mixture.items()}}.items():
        if part.captions.file:
            raise ValueError(
                f"{name}.captions.file={part.captions.file}, but {why}: make shards of the images with those captions "
                "(data_tools.make_shards), and precompute"
            )


class Precision(Enum):
    """Arithmetic of the encoder."""

    float32 = "float32"
    """Exact: on a GPU without TensorFloat-32 too."""
    bfloat16 = "bfloat16"
    """Several times faster on a GPU; its error against float32 is measured on the audited images and recorded."""


@dataclass(kw_only=True, slots=True)
class PrecomputeConfig:
    """How images become latents."""

    batch: int
    """Images encoded at once."""
    audit: int
    """Images of each shard that are decoded again and compared."""
    min_psnr: float
    """Decibels below which a shard's audit fails; 0 turns the gate off, not the measurement."""
    latent_std: list[float]
    """Lowest and highest standard deviation of a shard's latents; outside, its audit fails."""
    max_latent_mean: float
    """Highest absolute mean of a shard's latents, in their standard deviations."""
    max_white_bars: float
    """Highest share, 0 to 1, of a shard's images that may have white bars, unless transform.border=keep wants them."""
    limit_shards: int = 0
    """Encode only the first so many shards; 0 for all. What is done already stays."""
    precision: Precision = Precision.float32
    """Of the encoder's arithmetic; the cache holds float16 either way."""
    compile: bool = False
    """Compile the encoder: a minute or more before the first image, faster from then on."""
    flip: bool = False
    """Store the latent of each image's mirror image too, as `{key}.flip.npy`: twice the work and the space."""
    text_embeddings: bool = False
    """Store what a frozen text encoder (conditioning=clip_text) makes of each caption, as `{key}.text.npy`."""
    overwrite: bool = False
    """Replace a cache that was made with other settings, instead of refusing it."""

    def __post_init__(self) -> None:
        if self.batch < 1 or self.audit < 1 or self.limit_shards < 0:
            raise ValueError(
                f"precompute.batch={self.batch}, precompute.audit={self.audit}: each at least 1; "
                f"precompute.limit_shards={self.limit_shards}: a number of shards, or 0 for all"
            )
        if len(self.latent_std) != 2 or not 0 <= self.latent_std[0] < self.latent_std[1]:
            raise ValueError(f"precompute.latent_std={self.latent_std}; give [LOWEST, HIGHEST], neither below 0")
        if self.max_latent_mean <= 0 or not 0 <= self.max_white_bars <= 1:
            raise ValueError(
                f"precompute.max_latent_mean={self.max_latent_mean}: above 0; "
                f"precompute.max_white_bars={self.max_white_bars}: a share, 0 to 1"
            )


@dataclass(kw_only=True, slots=True)
class PrecomputeJob(Experiment):
    """`precompute_latents.py`."""

    precompute: PrecomputeConfig
    """How images become latents."""

    def __post_init__(self) -> None:
        Experiment.__post_init__(self)
        if self.precompute.text_embeddings and not isinstance(self.conditioning, ClipTextConfig):
            raise ValueError(
                f"precompute.text_embeddings=true with conditioning={_kind_of(self.conditioning)}: only what a frozen "
                "text encoder says can be cached, that of conditioning=clip_text: +experiment=stable_diffusion_v1"
            )


@dataclass(kw_only=True, slots=True)
class Drawing:
    """What jobs share that draw images with a trained model."""

    checkpoint: str = "latest"
    """Of a training run: `latest`, or the name of a directory in its `checkpoints`."""
    weights: str = "ema"
    """Of a training run: `ema` (the first half-life), `ema/HALF_LIFE`, or `raw`."""
    imports: list[str] = field(default_factory=list)
    """Modules imported before the configuration is composed."""
    sampler: SamplerConfig
    """How images are made."""
    batch: int
    """Images made at once, per process."""
    seed: int
    """Of the noise; image i has its own stream (seed, i)."""
    paths: PathsConfig
    """Where things lie that no run owns."""

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}; at least 1")
        if self.weights not in ("raw", "ema") and not self.weights.removeprefix("ema/").isdigit():
            raise ValueError(f"weights={self.weights!r}; raw, ema, or ema/HALF_LIFE_IN_IMAGES")


class Distance(Enum):
    """How far a picture is from the one that guides it."""

    l2 = "l2"
    """Squared error of pixels."""
    lpips = "lpips"
    """Learnt perceptual distance; needs `paths.weights`."""


@dataclass(kw_only=True, slots=True)
class GuideConfig:
    """Guidance by a small picture (Rombach et al. 2022, appendix C): what is drawn looks like it when made as small."""

    images: str | None = None
    """A picture, or several (directory or glob): one for all, or one each. None: no guidance."""
    scale: float | None = None
    """How strongly; goes with `images`."""
    distance: Distance = Distance.l2
    """What guidance makes small."""

    def __post_init__(self) -> None:
        if (self.images is None) != (self.scale is None) or (self.images is None and self.distance is not Distance.l2):
            raise ValueError("guide.images=FILES and guide.scale=NUMBER go together, and guide.distance= needs both")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"guide.scale={self.scale}; must be above 0")


@dataclass(kw_only=True, slots=True)
class TilesConfig:
    """Denoising and decoding in overlapping tiles, for sizes beyond memory."""

    size: int | None = None
    """Side of a tile in latent cells; None: all at once."""
    overlap: int | None = None
    """Cells that neighbours share; None: a quarter of the side."""

    def __post_init__(self) -> None:
        if self.size is None and self.overlap is not None:
            raise ValueError(f"tiles.overlap={self.overlap} without tiles.size, the side of a tile in latent cells")
        self.build()

    def build(self) -> Tiles | None:
        """The tiles; None for none."""
        if self.size is None:
            return None
        return Tiles(size=self.size, overlap=self.size // 4 if self.overlap is None else self.overlap)


@dataclass(kw_only=True, slots=True)
class SampleJob(Drawing):
    """`sample.py`. Files are named by a path, a directory, a glob or a list (`.txt`)."""

    run_dir: str | None = None
    """The run directory of a training."""
    model: str | None = None
    """Instead of `run_dir`: a model directory, as `ldm_scale.interop` writes them."""

    prompts: list[str] = field(default_factory=list)
    """For a model of captions: the captions."""
    prompts_file: str | None = None
    """Instead of `prompts`: a text file with one caption a line."""
    classes: list[int] = field(default_factory=list)
    """For a model of classes: their numbers."""
    boxes: str | None = None
    """For a model of layouts: a JSON file, see docs/sampling.md."""
    label_maps: str | None = None
    """For a model of label maps: PNG files whose pixels are labels."""
    low_resolution: str | None = None
    """For a super-resolution model: small pictures."""
    count: int | None = None
    """For an unconditional model: how many pictures."""
    images_per_prompt: int = 1
    """Pictures of each caption, class, layout, map ..., each with its own noise."""

    images: str | None = None
    """Inpainting, by a model trained for it or by any other: pictures whose masked part is painted anew."""
    masks: str | None = None
    """The masks of `images`, of the same names or one for all: white is painted, black is kept."""
    start: str | None = None
    """Pictures to start from instead of noise, one for all or one each."""
    strength: float | None = None
    """Share of the steps that redraws `start`, above 0; 1 keeps next to nothing of it."""
    guide: GuideConfig = field(default_factory=GuideConfig)
    """Guidance by a small picture."""
    size: list[int] | None = None
    """[height, width] of the pictures, pixels; None: as in training."""
    tiles: TilesConfig = field(default_factory=TilesConfig)
    """Denoising and decoding in tiles."""
    out: str | None = None
    """Directory of the PNGs and the grid; None: one for each request, in `samples` of the run or model."""

    def __post_init__(self) -> None:
        Drawing.__post_init__(self)
        if (self.run_dir is None) == (self.model is None):
            raise ValueError("name the model: run_dir=RUN or model=DIRECTORY, one of the two")
        if self.model is not None and (self.checkpoint, self.weights) != ("latest", "ema"):
            raise ValueError("checkpoint= and weights= choose within run_dir=; a model= directory holds one set")
        if self.prompts and self.prompts_file:
            raise ValueError("give prompts=['a caption', ...] or prompts_file=FILE, one of the two")
        for name, value in (("images_per_prompt", self.images_per_prompt), ("count", self.count)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; at least 1")
        for one, other in (("images", "masks"), ("start", "strength")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"{one}= and {other}= go together: give both, or neither")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength}; must lie above 0 and at most at 1")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size={self.size}; give [height, width] in pixels")


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


def register(group: str, kind: str, config: type) -> None:
    """Make a config dataclass known: files of `conf/{group}` build on it by `defaults: [{kind}_schema]`.

    A part from outside this tree calls this when imported through `imports=[its.module]`.
    """
    ConfigStore.instance().store(group=group, name=f"{kind}_schema", node=config)
    _KINDS.setdefault(group, {})[kind] = config


_KINDS: dict[str, dict[str, type]] = {}
for _group, _kind, _config in (
    ("first_stage", "autoencoder_kl", AutoencoderKLConfig),
    ("first_stage", "autoencoder_vq", AutoencoderVQConfig),
    ("first_stage", "identity", IdentityConfig),
    ("autoencoder_loss", "autoencoder_loss", AutoencoderLossConfig),
    ("unet", "unet", UNetConfig),
    ("conditioning", "text_transformer", TextTransformerConfig),
    ("conditioning", "clip_text", ClipTextConfig),
    ("conditioning", "class_label", ClassLabelConfig),
    ("conditioning", "layout", LayoutConfig),
    ("conditioning", "label_map", LabelMapConfig),
    ("conditioning", "concat", ConcatConfig),
    ("diffusion", "diffusion", DiffusionConfig),
    ("sampler", "ddim", DDIMConfig),
    ("sampler", "ddpm", DDPMConfig),
    ("sampler", "dpm_solver", DPMSolverConfig),
    ("sampler", "plms", PLMSConfig),
    ("data", "data", DataConfig),
    ("engine", "engine", EngineConfig),
    ("optimizer", "adamw", OptimizerConfig),
    ("evaluation", "evaluation", EvaluationConfig),
    ("tracker", "tracker", TrackerConfig),
    ("paths", "paths", PathsConfig),
):
    register(_group, _kind, _config)

JOBS: Mapping[str, type] = {
    "train": TrainJob,
    "precompute_latents": PrecomputeJob,
    "sample": SampleJob,
    "evaluate": EvaluateJob,
}
for _name, _schema in JOBS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)


def main(job: str, run: Callable[[Any], None]) -> None:
    """Compose the configuration of `job` from the command line, and run it."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print and exit on; the words below are ours

    def start(config: DictConfig) -> None:
        run(read_job(config, JOBS[job]))

    def compose_and_start() -> None:
        import_parts(sys.argv[1:])
        sys.argv[1:] = with_model_defaults(job, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=job)(start)()

    or_exit(compose_and_start)


def or_exit(job: Callable[[], None]) -> None:
    """Run a job; what a user can mend (a ValueError or a missing file) ends it in one plain sentence."""
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(explain(error))
    except (ValueError, FileNotFoundError) as error:
        _refuse(str(error))


def _refuse(sentence: str) -> None:
    """End the process; with LDM_SCALE_TRACEBACK=1 by the exception itself."""
    if os.environ.get("LDM_SCALE_TRACEBACK") == "1":
        raise
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(REFUSED_EXIT_CODE)


class BadConfig(ValueError):
    """A configuration that was composed, but says something impossible."""


def import_parts(overrides: Sequence[str]) -> None:
    """Import the modules that `imports=[...]` names, so that what they register can be composed."""
    for text in overrides:
        if text.startswith("imports="):
            modules = OverridesParser.create().parse_override(text).value()
            for module in modules if isinstance(modules, list) else [modules]:
                sys.path.append(os.getcwd())  # last: a job that runs a copy of the code has its parts from there
                importlib.import_module(str(module))
                sys.path.pop()


def with_model_defaults(job: str, overrides: Sequence[str]) -> list[str]:
    """For a job that draws with a trained model: its own sampler and evaluation first, then what the user says.

    Another sampler (`sampler=NAME`) has its own file's values, but guides as the model's own does.
    """
    given = dict(text.split("=", 1) for text in overrides if "=" in text)
    if not issubclass(JOBS[job], Drawing):
        return list(overrides)
    if "run_dir" in given and (file := RunDir(Path(given["run_dir"])).config).exists():
        return [*_run_defaults(storage.read_json(file), JOBS[job], given), *overrides]
    if "model" in given and (file := Path(given["model"]) / "latent_diffusion" / "config.json").exists():
        conditioning = storage.read_json(file)["latent_diffusion"]["conditioning"]
        captioned = conditioning is not None and conditioning["schema"] in ("text_transformer", "clip_text")
        return [*([] if captioned else ["sampler.guidance=1"]), *overrides]  # the files' is for captions
    return list(overrides)


def _run_defaults(trained: Mapping[str, Any], schema: type, given: Mapping[str, str]) -> list[str]:
    defaults = []
    for section in {"sampler", "evaluation"} & {f.name for f in dataclasses.fields(schema)}:
        chosen = section in given
        if section == "sampler" and not chosen:
            defaults.append(f"sampler={trained[section]['schema']}")
        shared = [key for key in trained[section] if key.startswith("guidance" if chosen else "") and key != "schema"]
        values = {key: "null" if trained[section][key] is None else trained[section][key] for key in shared}
        defaults += [f"{section}.{key}={value}" for key, value in values.items()]
    return defaults


def combinations(overrides: Sequence[str]) -> list[list[str]]:
    """All command lines that `key=1,2` or `key=range(1,4)` stand for, as Hydra's multirun reads them."""
    choices = []
    for text, one in zip(overrides, OverridesParser.create().parse_overrides(list(overrides)), strict=True):
        values = one.sweep_string_iterator() if one.is_sweep_override() else ()
        choices.append([f"{one.get_key_element()}={value}" for value in values] or [text])
    return [list(chosen) for chosen in itertools.product(*choices)]


def compose(job: str, overrides: Sequence[str]) -> Any:
    """The job that a command line would run: for tests and tools that are not started through Hydra."""
    import_parts(overrides)
    overrides = with_model_defaults(job, overrides)
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return read_job(hydra.compose(job, overrides=list(overrides)), JOBS[job])


def read_job(config: DictConfig, schema: type[Job]) -> Job:
    """The composed configuration as dataclasses, each having checked itself.

    raises  BadConfig for an unknown key, an impossible value, or a key that was left out
    """
    _refuse_unknown(config, prefix="")
    missing = [str(key) for key in config if OmegaConf.is_missing(config, key)]
    if "experiment" in missing:
        names = ", ".join(sorted(file.stem for file in (CONF / "experiment").glob("*.yaml")))
        raise BadConfig(f"name an experiment: +experiment=NAME, one of {names}")
    missing = missing or sorted(OmegaConf.missing_keys(config))
    if missing:
        others = f" (also missing: {', '.join(missing[1:])})" if missing[1:] else ""
        raise BadConfig(f"{missing[0]} has no default here: add {missing[0]}=VALUE{others}")
    try:
        job = OmegaConf.to_object(config)
    except (ValueError, TypeError) as error:
        raise BadConfig(str(error)) from error
    assert isinstance(job, schema)
    return job


def _refuse_unknown(config: DictConfig, prefix: str) -> None:
    """`+key=` opens what the schema had closed; look at every key once more."""
    known = OmegaConf.get_type(config)
    if not dataclasses.is_dataclass(known):
        return
    names = [f.name for f in dataclasses.fields(known)]
    for key in map(str, config):
        if key not in names:
            raise BadConfig(_unknown_key(f"{prefix}{key}", names))
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            _refuse_unknown(node, f"{prefix}{key}.")


def explain(error: BaseException) -> str:
    """What is wrong with a configuration, in one sentence: the key, what was given and what is allowed."""
    place = f"{str(error).split(':')[0]}: " if str(error).startswith("In '") else ""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            return place + _explain_key(cause)
        cause = cause.__cause__
    return str(error)


def _explain_key(error: OmegaConfBaseException) -> str:
    if isinstance(error, ValidationError):
        return f"{error.full_key}: {str(error.msg).splitlines()[0]}"
    parent = error.parent_node
    return _unknown_key(str(error.full_key), [str(key) for key in parent] if isinstance(parent, DictConfig) else [])


def _unknown_key(full_key: str, known: Sequence[str]) -> str:
    if not known:  # names of the user's own go here, and Hydra adds none without being told to
        return f"unknown key {full_key}. To add names: +{full_key.rpartition('.')[0]}={{NAME: ...}}, with a plus"
    close = difflib.get_close_matches(full_key.rpartition(".")[2], known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"unknown key {full_key}{hint} Known here: {', '.join(sorted(known))}"


def to_plain(config: Any) -> Any:
    """A config dataclass as JSON values; each registered part names its `schema`, for `from_plain`."""
    if dataclasses.is_dataclass(config):
        values = {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
        kind = _kind_of(config)
        return {"schema": kind, **values} if kind is not None else values
    if isinstance(config, Enum):
        return config.name
    if isinstance(config, Mapping):
        return {key: to_plain(value) for key, value in config.items()}
    return [to_plain(value) for value in config] if isinstance(config, list) else config


def _kind_of(config: Any) -> str | None:
    """The name that the class of a part was registered by; None for what is no part."""
    kinds = (kind for known in _KINDS.values() for kind, one in known.items() if one is type(config))
    return next(kinds, None)


def from_plain(group: str, values: Mapping[str, Any]) -> Any:
    """The config dataclass of a part of `group` that `to_plain` wrote.

    raises  ValueError for a schema that nobody registered
    """
    plain = dict(values)
    kind = plain.pop("schema")
    if kind not in _KINDS[group]:
        raise ValueError(
            f"{group} {kind!r} is unknown here; known: {', '.join(_KINDS[group])}; imports=[...] brings others"
        )
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(_KINDS[group][kind]), plain))


def job_from_plain(job: str, values: Mapping[str, Any]) -> Any:
    """The job that `to_plain` wrote, having checked itself again.

    raises  ValueError for a schema that nobody registered, BadConfig for a key or value of another version
    """
    import_parts([f"imports=[{','.join(values['imports'])}]"])
    parts = {
        key: from_plain(key, value) if isinstance(value, Mapping) and "schema" in value else value
        for key, value in values.items()
    }
    try:
        merged = OmegaConf.merge(OmegaConf.structured(JOBS[job]), parts)
        assert isinstance(merged, DictConfig)
        return read_job(merged, JOBS[job])
    except OmegaConfBaseException as error:
        raise BadConfig(explain(error)) from error
