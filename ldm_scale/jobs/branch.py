"""Where a new run takes its first weights from: `init=`. A run with a checkpoint of its own does not look there again.

A parent is a checkpoint of a training run (the run's newest unless named), or weights without a training: what
`ldm_scale.interop` wrote, or what a run published.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.core import runtime, storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import identity
from ldm_scale.jobs.schemas.train import InitWhat, TrainJob
from ldm_scale.training import checkpoint, checkpoint_files
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine

log = runtime.logger(__name__)

_SCALE_TOLERANCE = 1e-3  # relative; beyond it latents look noisier or cleaner to the U-Net than their timestep says


@dataclass(frozen=True, kw_only=True, slots=True)
class Parent:
    """What a run branches from: known before any weights are read."""

    where: Path
    """A checkpoint, or a weights directory."""
    kind: str | None
    """Which numbers of a checkpoint: `weight`, `ema/HALF_LIFE`, or `all`; None for a weights directory."""
    parts: Mapping[str, Any]
    """Its first stage, or its U-Net, conditioning and diffusion, as JSON values."""
    left_out: str | None = None
    """Prefix of its tensors that the run does not train: those of a frozen text encoder."""
    latent_scale: float | None
    """What its U-Net's latents were multiplied by; None for a first stage."""

    def described(self) -> dict[str, str | None]:
        """For the history of the run that branches off."""
        return {"path": str(self.where), "kind": self.kind}

    def begin(self, engine: Engine, ema: EMA, checkpoints: Checkpoints) -> dict[str, Any] | None:
        """Give the run its weights; of all the rest, what `init_what` asks for. Collective.

        returns  the state of the parent's checkpoint where the run goes on from it with everything, else None
        raises   ValueError listing names that are missing, unexpected or of another shape
        """
        if self.kind == "all":
            return checkpoints.load(self.where)
        tensors = self._tensors()
        buffers = checkpoint.persistent_buffers(engine.module)
        wanted = engine.masters.shapes | weights.shapes(buffers)
        weights.require_same_architecture(weights.shapes(tensors), wanted, str(self.where))
        engine.masters.assign(tensors)
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(tensors[name])
        ema.reset()
        return None

    def require_fits(self, state: Mapping[str, Any]) -> None:
        """Refuse to go on with latents of another spread than those that the weights know.

        state   what checkpoints of the new run will carry
        raises  ValueError naming both scales
        """
        theirs = self.latent_scale
        if theirs is not None and abs(state["latent_scale"] / theirs - 1) > _SCALE_TOLERANCE:
            raise ValueError(
                f"init={self.where} was trained on latents times {theirs:.5g}, this run multiplies them by "
                f"{state['latent_scale']:.5g}: set first_stage.scale={theirs:.5g}"
            )

    def _tensors(self) -> dict[str, Tensor]:
        if self.kind is None:
            held = weights.load(self.where).tensors
            return {n: t for n, t in held.items() if self.left_out is None or not n.startswith(self.left_out)}
        return checkpoint_files.read_consolidated(self.where, self.kind)[1]


def parent_of(job: TrainJob) -> Parent | None:
    """What `init=` names, None where it names nothing; says where the parent was configured differently.

    raises  FileNotFoundError where there is nothing of the kind, ValueError where it cannot give `init_what`
    """
    if job.init is None:
        return None
    given = Path(job.init)
    run, above = RunDir(given), RunDir(given.parent.parent)
    if run.checkpoints.is_dir():
        parent = _from_run(job, run, "latest")
    elif given.parent == above.checkpoints:
        parent = _from_run(job, above, given.name)
    else:
        parent = _from_weights(job, given)
    _say_differences(job, parent)
    return parent


def _from_run(job: TrainJob, run: RunDir, name: str) -> Parent:
    config = storage.read_json(run.config)
    if (config["unet"] is None) != job.trains_first_stage:
        raise ValueError(
            f"init={job.init} trained a {'first' if config['unet'] is None else 'second'} stage, not this one's"
        )
    where = checkpoint_files.find(run.checkpoints, name)
    kinds = {InitWhat.weights: "weight", InitWhat.ema: f"ema/{config['ema_half_lives'][0]}", InitWhat.all: "all"}
    keys = ("first_stage",) if job.trains_first_stage else ("unet", "conditioning", "diffusion")
    return Parent(
        where=where,
        kind=kinds[job.init_what],
        parts={key: config[key] for key in keys},
        latent_scale=checkpoint_files.read_state(where).get("latent_scale"),
    )


def _from_weights(job: TrainJob, given: Path) -> Parent:
    name = "first_stage" if job.trains_first_stage else "latent_diffusion"
    where = given / name if (given / name).is_dir() else given
    if not (where / "config.json").exists():
        raise FileNotFoundError(
            f"init={job.init} is none of these: a training run with checkpoints, one of its checkpoints, a model "
            "directory that ldm_scale.interop wrote, a weights directory"
        )
    config = storage.read_json(where / "config.json")
    if name not in config:
        raise ValueError(f"init={job.init} holds no {name.replace('_', ' ')}, which this job trains")
    if job.init_what is not InitWhat.weights:
        raise ValueError(
            f"init_what={job.init_what.name}, but {where} holds one set of weights and no training: init_what=weights"
        )
    parts = {"first_stage": config[name]} if job.trains_first_stage else config[name]
    left_out = "conditioner." if isinstance(job.conditioning, ClipTextConfig) else None
    return Parent(where=where, kind=None, parts=parts, left_out=left_out, latent_scale=config.get("latent_scale"))


def _say_differences(job: TrainJob, parent: Parent) -> None:
    """Shapes are compared by `begin`; what else differs may be the purpose of the branch, but must be seen."""
    ours = jobs_config.to_plain(job)
    differing = identity.differences(dict(parent.parts), {key: ours[key] for key in parent.parts})
    told = {key: pair for key, pair in differing.items() if not identity.is_free(key)}
    if told:
        log.warning("init=%s was configured with %s", job.init, identity.shown(told))
