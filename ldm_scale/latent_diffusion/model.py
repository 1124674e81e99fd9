"""The latent diffusion model: a U-Net and its conditioner, trained as one (Rombach et al. 2022, equation 3).

Knows latents, not pixels: the first stage stays outside, frozen, without gradients or optimizer state.

Shape letters: B batch, C channels, H W latent height and width, L context tokens, D context width.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm_scale.conditioning.base import Conditioner, ConditionerConfig
from ldm_scale.diffusion.objective import ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import ScheduleConfig, TimestepTable
from ldm_scale.diffusion.timesteps import TimestepDraw
from ldm_scale.nn.unet import UNetConfig

_PARTS = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(kw_only=True, slots=True)
class DiffusionConfig:
    """The forward process, and what the network is asked for."""

    schedule: ScheduleConfig
    """How noise grows with the timestep."""
    objective: ObjectiveConfig
    """What the network predicts, and how its error is measured."""
    timesteps: TimestepDraw = TimestepDraw.uniform
    """How training draws its timesteps; sampling does not depend on it."""

    def __post_init__(self) -> None:
        if self.schedule.zero_terminal_snr and self.objective.prediction is Prediction.eps:
            raise ValueError(
                "diffusion.schedule.zero_terminal_snr=true with diffusion.objective.prediction=eps: where there is no "
                "signal, the noise says nothing of z_0. Choose prediction v or z0"
            )


@dataclass(kw_only=True, slots=True)
class LatentDiffusionConfig:
    """Everything that makes a second stage; what a checkpoint must agree with."""

    unet: UNetConfig
    """The denoiser."""
    conditioning: ConditionerConfig | None
    """What the denoiser is told besides the noisy latent; None for an unconditional model."""
    diffusion: DiffusionConfig
    """Schedule and objective."""

    def build(self) -> "LatentDiffusion":
        """Make the model with fresh weights, on torch's current default device."""
        conditioner = self.conditioning.build() if self.conditioning is not None else None
        return LatentDiffusion(self, conditioner)

    def build_trained(self) -> "LatentDiffusion":
        """The same without what is frozen: what an engine trains and a checkpoint holds."""
        conditioner = self.conditioning.build_trained() if self.conditioning is not None else None
        return LatentDiffusion(self, conditioner)


class LatentDiffusion(nn.Module):
    """U-Net and conditioner; `forward` is the loss, so that whatever wraps the module wraps the training step."""

    def __init__(self, config: LatentDiffusionConfig, conditioner: Conditioner | None) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.diffusion.schedule.build()
        self.objective = config.diffusion.objective.build()
        self._weights = TimestepTable(self.objective.weights(self.schedule.snr))
        self.unet = config.unet.build()
        self.conditioner = conditioner
        self.compute_dtype = torch.float32
        """Of products and convolutions where no engine is around the model: in drawing and in validation."""
        _require_widths(config.unet, conditioner)

    def use_dtypes(self, *, parameter: torch.dtype, compute: torch.dtype) -> None:
        """Draw in the number types of a training, so that its own scores are met exactly."""
        for weights in self.parameters():
            weights.data = weights.data.to(parameter)
        self.compute_dtype = compute

    def part_of(self, parameter: str) -> str:
        """The part that a parameter belongs to, by its name: down, mid, up, their cross_attention, the U-Net's ends
        (first and last layers, embeddings of timestep and vector), and the conditioner by what it is."""
        owner, _, name = parameter.partition(".")
        if self.conditioner is not None and owner == "conditioner":
            return self.conditioner.part
        return "cross_attention" if ".attn2." in name else _PARTS.get(name.partition(".")[0], "ends")

    def conditions(self, inputs: Tensor | None) -> dict[str, Tensor]:
        """What the U-Net is told besides the latent, by `network`'s arguments; empty for an unconditional model.

        inputs  the conditioner's inputs for each sample, (B, ...)
        """
        if self.conditioner is None:
            return {}
        with self._autocast():
            told = self.conditioner(inputs)
        named = {"context_BLD": told.context, "concat_BCHW": told.concat, "vector_BE": told.vector}
        return {name: value for name, value in named.items() if value is not None}

    def sampling_conditions(self, inputs: Tensor | None) -> dict[str, Tensor]:
        """The same, made ready for many steps: keys and values of the context, which no step changes, in its place."""
        conditions = self.conditions(inputs)
        if "context_BLD" in conditions:
            with self._autocast():
                conditions["keys_values_BF"] = self.unet.keys_values(conditions.pop("context_BLD"))
        return conditions

    def network(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        *,
        context_BLD: Tensor | None = None,
        concat_BCHW: Tensor | None = None,
        vector_BE: Tensor | None = None,
        keys_values_BF: Tensor | None = None,
    ) -> Tensor:
        """What the U-Net says of noisy latents, (B, C, H, W); `concat_BCHW` may be 1 x 1, the same everywhere."""
        if concat_BCHW is not None:
            concat_BCHW = concat_BCHW.expand(-1, -1, *z_BCHW.shape[2:])
            z_BCHW = torch.cat((z_BCHW, concat_BCHW), dim=1)
        with self._autocast():
            return self.unet(z_BCHW, t_B, context_BLD, vector_BE, keys_values_BF=keys_values_BF)

    def forward(self, z_0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, inputs: Tensor | None) -> Tensor:
        """The loss of each sample, (B,), float32, weighted by its timestep.

        z_0_BCHW    clean latents, scaled to unit variance
        noise_BCHW  standard normal noise
        t_B         int64 timesteps, 0 .. schedule.steps - 1
        inputs      the conditioner's inputs, already replaced by its null inputs where guidance wants them dropped
        """
        alpha, sigma = self.schedule.levels(t_B, z_0_BCHW)
        z_t_BCHW = alpha * z_0_BCHW + sigma * noise_BCHW
        out_BCHW = self.network(z_t_BCHW, t_B, **self.conditions(inputs))
        loss_B = self.objective.per_sample_loss(out_BCHW, self.objective.target(z_0_BCHW, noise_BCHW, alpha, sigma))
        return loss_B * self._weights(t_B, loss_B)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.compute_dtype is torch.float32:
            return nullcontext()  # an engine's own stays on
        return torch.autocast(next(self.parameters()).device.type, self.compute_dtype)


def _require_widths(unet: UNetConfig, conditioner: Conditioner | None) -> None:
    """Refuse a U-Net that reads other conditions than its conditioner gives.

    raises  ValueError naming the key of the U-Net, and the value that fits
    """
    context, concat, vector = (
        (conditioner.context_dim, conditioner.concat_channels, conditioner.vector_dim)
        if conditioner is not None
        else (0, 0, 0)
    )
    for key, value, fits, why in (
        ("context_dim", unet.context_dim, context, f"the conditioner gives context of width {context}"),
        (
            "in_channels",
            unet.in_channels,
            unet.out_channels + concat,
            f"the latent has unet.out_channels={unet.out_channels} and the conditioner appends {concat}",
        ),
        ("vector_dim", unet.vector_dim, vector, f"the conditioner gives a vector of width {vector}"),
    ):
        if value != fits:
            raise ValueError(f"unet.{key}={value}, but {why}: set it to {fits}, or choose another conditioner")
