"""The configuration of `train.py`."""

from dataclasses import dataclass, field
from enum import Enum

from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.data.config import DataConfig, Origin
from ldm_scale.first_stage.identity import IdentityConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig, Rescale
from ldm_scale.first_stage.loss import AutoencoderLossConfig
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.jobs.schemas.experiment import Experiment
from ldm_scale.training.engine import EngineConfig, EngineKind
from ldm_scale.training.guards import GuardConfig

_UNTRAINED_CONDITIONERS: dict[type, str] = {
    ClassLabelConfig: "class_label",
    ConcatConfig: "concat",
    LabelMapConfig: "label_map",
    LayoutConfig: "layout",
}


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
        if 0 < self.guard.phase_minutes <= self.max_unsaved_minutes:
            raise ValueError(
                f"max_unsaved_minutes={self.max_unsaved_minutes:g}: after guard.phase_minutes="
                f"{self.guard.phase_minutes:g} the last save, tried again and again, would be taken for a hang. Set "
                f"guard.phase_minutes={2 * self.max_unsaved_minutes:g}"
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

    def require_trainable(self) -> None:
        """Refuse what can be configured, and planned, but not trained yet.

        raises  ValueError naming the key
        """
        if kind := _UNTRAINED_CONDITIONERS.get(type(self.conditioning)):
            raise ValueError(
                f"conditioning={kind} cannot be trained yet: batches carry no other condition "
                "than captions for a text_transformer or a clip_text. These can: +experiment=txt2img_laion, "
                "+experiment=uncond_lsun_churches"
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
