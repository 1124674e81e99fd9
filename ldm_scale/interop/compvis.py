"""Checkpoints of the original latent-diffusion code, read into our modules (facts.md 1, 5.2 and 6.1).

    python -m ldm_scale.interop.compvis CONFIG CKPT OUT

`compvis_config` reads the YAML file, `compvis_file` the checkpoint, `compvis_names` says which tensor is which.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm_scale.core import runtime, weights
from ldm_scale.diffusion.schedule import NoiseSchedule
from ldm_scale.interop import bundle as bundles
from ldm_scale.interop import compvis_config, compvis_file, compvis_names
from ldm_scale.interop.bundle import Bundle
from ldm_scale.interop.compvis_config import Described
from ldm_scale.interop.compvis_names import Source

log = runtime.logger(__name__)

_UNET, _FIRST_STAGE, _CONDITIONER = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
_AVERAGED_BELOW = "model."
_SCALE, _LEVELS = "scale_factor", "alphas_cumprod"
_DIFFERENT_LEVELS = 1e-3  # float16 files round by less; schedules that differ at all differ by more, somewhere

_IGNORED = {
    # the schedule's tables, which the configuration says
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
    "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    # weights of the training loss
    "lvlb_weights", "logvar",
    # the text transformer's unused head (facts.md 2.3), and the numbers 0 to 76
    "cond_stage_model.transformer.to_logits.weight", "cond_stage_model.transformer.to_logits.bias",
    "cond_stage_model.transformer.text_model.embeddings.position_ids",
}  # fmt: skip
_LOSS_OF_FIRST_STAGE = ("loss.", "first_stage_model.loss.")  # discriminator, perceptual network


def load(config_yaml: str | Path, checkpoint: str | Path, *, raw: bool = False) -> Bundle:
    """An original model with its weights, on the CPU, in float32 and evaluation mode.

    config_yaml  the YAML file it was trained with: a diffusion model, or a first stage alone
    checkpoint   .ckpt (with or without a `state_dict` around the weights) or .safetensors
    raw          take the weights as the optimizer left them, even where there is an average of them
    raises       FileNotFoundError where a file is absent; ValueError for a configuration that cannot be built here, a
                 file with code in it, or weights of another architecture: missing, unexpected, mis-shaped ones listed
    """
    described, path = compvis_config.read(Path(config_yaml)), Path(checkpoint)
    tensors = _chosen(compvis_file.read(path), described, raw=raw)
    scale = _latent_scale(described, tensors.pop(_SCALE, None), path)
    if described.diffusion is not None and _LEVELS in tensors:
        _require_levels(described.diffusion.schedule.build(), tensors[_LEVELS], path)
    bundle = _built(described, scale)
    _fill(bundle, described, tensors, path)
    return bundle


def _chosen(tensors: dict[str, Tensor], described: Described, *, raw: bool) -> dict[str, Tensor]:
    """One of each weight: its average where there is one, or the raw one."""
    if not compvis_file.has_averaged(tensors):
        return dict(tensors)
    log.info("%s weights chosen; the file has both", "raw" if raw else "averaged")
    if raw:
        return compvis_file.raw(tensors)
    prefix = "" if described.unet is None else _AVERAGED_BELOW
    return compvis_file.averaged(tensors, prefix, ignored=_LOSS_OF_FIRST_STAGE)


def _latent_scale(described: Described, stored: Tensor | None, path: Path) -> float:
    """The factor from latents to what the U-Net sees: said by the configuration, or measured and in the checkpoint."""
    if described.scale_by_std and stored is None:
        raise ValueError(
            f"{path} has no {_SCALE}, which model.params.scale_by_std=true asks for; write the number that was used as "
            f"model.params.{_SCALE}, and scale_by_std: false"
        )
    if stored is None:
        return described.latent_scale
    if not described.scale_by_std and abs(float(stored) - described.latent_scale) > 1e-3 * described.latent_scale:
        raise ValueError(
            f"{path} was trained with {_SCALE} {float(stored):g}, but the configuration has model.params.{_SCALE}="
            f"{described.latent_scale:g}; set scale_by_std: true to take the checkpoint's"
        )
    return float(stored)


def _require_levels(schedule: NoiseSchedule, stored: Tensor, path: Path) -> None:
    """Refuse a schedule that is not the one whose table lies in the checkpoint."""
    ours = schedule.alphas_cumprod
    if stored.shape != ours.shape or float((stored.double() - ours).abs().max()) > _DIFFERENT_LEVELS:
        raise ValueError(
            f"{path} was trained with {len(stored)} noise levels ending at {_LEVELS}={float(stored[-1]):.3g}; the "
            f"configuration's linear_start, linear_end and timesteps give {len(ours)}, ending at {float(ours[-1]):.3g}"
        )


def _built(described: Described, scale: float) -> Bundle:
    """The modules, with fresh weights."""
    alone = described.unet is None
    first_stage = described.first_stage if alone else dataclasses.replace(described.first_stage, scale=scale)
    return Bundle(
        first_stage=first_stage.build().eval(),
        unet=None if described.unet is None else described.unet.build().eval(),
        conditioner=None if described.conditioning is None else described.conditioning.build().eval(),
        diffusion=described.diffusion,
        latent_scale=scale,
    )


def _fill(bundle: Bundle, described: Described, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy the checkpoint's tensors into the modules, all of them, but for what is known to be idle."""
    sources = _sources(bundle, described)
    modules = {"first_stage": bundle.first_stage, "unet": bundle.unet, "conditioner": bundle.conditioner}
    whole = nn.ModuleDict({name: module for name, module in modules.items() if module is not None})
    found = {ours: source.take(tensors[source.name]) for ours, source in sources.items() if source.name in tensors}
    read = {source.name for source in sources.values()}
    copies = _copies_of_first_stage(tensors) if described.conditioner_is_first_stage else set()
    for name in tensors.keys() - read - copies - _IGNORED:
        if not name.startswith(_LOSS_OF_FIRST_STAGE):
            found[name] = tensors[name]
    weights.load_exactly(whole, found, str(path))


def _sources(bundle: Bundle, described: Described) -> dict[str, Source]:
    """Sources of every tensor of a bundle, by full names on both sides."""
    first_stage_below = "" if bundle.unet is None else _FIRST_STAGE
    parts = [("first_stage.", first_stage_below, compvis_names.first_stage(bundle.first_stage))]
    if bundle.unet is not None:
        parts.append(("unet.", _UNET, compvis_names.unet(bundle.unet, described.head_order)))
    if bundle.conditioner is not None:
        parts.append(("conditioner.", _CONDITIONER, compvis_names.conditioner(bundle.conditioner)))
    return {
        below + ours: dataclasses.replace(source, name=there + source.name)
        for below, there, sources in parts
        for ours, source in sources.items()
    }


def _copies_of_first_stage(tensors: dict[str, Tensor]) -> set[str]:
    """Names of what a conditioner that is the first stage repeats of it, bit for bit."""
    repeated = {name: name.replace(_CONDITIONER, _FIRST_STAGE, 1) for name in tensors if name.startswith(_CONDITIONER)}
    return {
        name
        for name, original in repeated.items()
        if original in tensors and torch.equal(tensors[name], tensors[original])
    }


# The command line -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 where nothing was written."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_scale.interop.compvis",
        description="Turn a checkpoint of the original latent-diffusion code into weights directories.",
    )
    parser.add_argument("config", type=Path, help="the YAML file that the checkpoint was trained with")
    parser.add_argument("checkpoint", type=Path, help=".ckpt or .safetensors")
    parser.add_argument("out", type=Path, help="a new directory: first_stage/ and latent_diffusion/ are written there")
    parser.add_argument("--raw", action="store_true", help="the last weights, even where there is an average of them")
    arguments = parser.parse_args(argv)
    runtime.configure_logging()
    try:
        _convert(arguments.config, arguments.checkpoint, arguments.out, raw=arguments.raw)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _convert(config: Path, checkpoint: Path, out: Path, *, raw: bool) -> None:
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name a new directory")
    bundle = load(config, checkpoint, raw=raw)
    if bundle.unet is not None:
        bundle.latent_diffusion()  # refuses parts that do not fit one another, before anything is written
    for directory in bundles.save(bundle, out):
        print(f"wrote {directory}")
    parts = {"first stage": bundle.first_stage, "U-Net": bundle.unet, "conditioner": bundle.conditioner}
    for name, part in parts.items():
        if part is not None:
            print(f"  {name:<12} {_parameters(part):>13,} parameters")
    print(_next(bundle, out))


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _next(bundle: Bundle, out: Path) -> str:
    """What to type now."""
    use = f"first_stage.checkpoint={out / bundles.FIRST_STAGE}"
    if bundle.unet is None:
        return f"Train on its latents:  python precompute_latents.py +experiment=NAME {use}"
    return (
        f"Train on its latents:  python precompute_latents.py +experiment=NAME {use}\n"
        f"Hand it to diffusers:  python -m ldm_scale.interop.diffusers export {out} DIRECTORY"
    )


if __name__ == "__main__":
    sys.exit(main())
