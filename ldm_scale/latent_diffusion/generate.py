"""Captions or other conditions in, images out: conditioner, noise, sampler, first stage; and what steers them.

The noise of an image has its own stream, (seed, index), so a picture depends neither on the batch it is made in nor on
how many processes share the work. The size is any that the strides of first stage and U-Net allow (Rombach et al. 2022,
section 4.3.2).

Shape letters: B batch, C channels, H W height and width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ldm_scale.core import rng
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.latent_diffusion.model import LatentDiffusion
from ldm_scale.latent_diffusion.tiled_decoding import decode_in_tiles
from ldm_scale.latent_diffusion.tiles import Tiles, tiled
from ldm_scale.samplers.base import Denoise, SamplerConfig, Watch, guided_denoiser
from ldm_scale.samplers.image_guiding import guided_by_image
from ldm_scale.samplers.inpainting import keep_known

Distance = Callable[[Tensor, Tensor], Tensor]
"""(images, images), both (B, 3, H, W) around [-1, 1] -> (B,); differentiable in the first."""


def l2(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Half the squared error, summed over each image, (B,); Rombach et al. 2022, appendix C."""
    return 0.5 * (a_BCHW - b_BCHW).square().flatten(1).sum(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageGuide:
    """Images that the generated ones should look like once they are reduced to their size."""

    images_BCHW: Tensor
    """In [-1, 1]; of the images' size or smaller. One for all, or one each."""
    scale: float
    """Weight of the distance. With `l2`, one over the variance of the noise that a guide's pixels are taken to have."""
    distance: Distance = l2
    """`l2`, or a perceptual network (first_stage/loss.py): an average over positions, so it asks for larger scales."""

    def fitted(self, batch: int, size: tuple[int, int], device: torch.device) -> "ImageGuide":
        """The same on `device`; raises ValueError for images larger than `size`, or neither one nor `batch` of them."""
        height, width = self.images_BCHW.shape[-2:]
        if height > size[0] or width > size[1] or len(self.images_BCHW) not in (1, batch):
            raise ValueError(
                f"guide.images_BCHW: {len(self.images_BCHW)} of {height} x {width}, to guide {batch} of {size[0]} x "
                f"{size[1]}; give one or {batch}, no larger than those"
            )
        return replace(self, images_BCHW=self.images_BCHW.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Steering:
    """Images that a walk is held to: in [-1, 1], of the generator's size, one for all or one each.

    raises  ValueError for parts that do not go together
    """

    start_BCHW: Tensor | None = None
    """What to start from, instead of pure noise (SDEdit, Meng et al. 2022)."""
    strength: float = 1.0
    """Share of the steps to walk from there, above 0: how much of the start may change."""
    known_BCHW: Tensor | None = None
    """What to keep where nothing is to be painted."""
    paint_B1HW: Tensor | None = None
    """1 where to paint, 0 where to keep; between them the two are mixed."""
    guide: ImageGuide | None = None
    """What to resemble as a whole."""

    def __post_init__(self) -> None:
        if (self.known_BCHW is None) != (self.paint_B1HW is None):
            raise ValueError("inpainting takes both the known image and where to paint; one of them is not given")
        if self.strength != 1 and self.start_BCHW is None:
            raise ValueError(
                f"strength={self.strength} is of a start image, but there is none; give one, or strength=1"
            )

    def fitted(self, batch: int, size: tuple[int, int], device: torch.device) -> "Steering":
        """The same on `device`; raises ValueError for images of another size, or neither one nor `batch` of them."""
        put = partial(_put, batch=batch, size=size, device=device)
        return replace(
            self,
            start_BCHW=put("start_BCHW", self.start_BCHW),
            known_BCHW=put("known_BCHW", self.known_BCHW),
            paint_B1HW=put("paint_B1HW", self.paint_B1HW),
            guide=self.guide and self.guide.fitted(batch, size, device),
        )

    def composited(self, images_BCHW: Tensor) -> Tensor:
        """Images with what is known put back, where there is any."""
        if self.known_BCHW is None or self.paint_B1HW is None:
            return images_BCHW
        return torch.lerp(self.known_BCHW, images_BCHW, self.paint_B1HW)


UNSTEERED = Steering()


@dataclass(frozen=True, kw_only=True, slots=True)
class Generator:
    """Draws images of captions, classes, maps ...: of what the model's conditioner prepares.

    latent_scale  what unscaled latents were multiplied by in training; undone before decoding
    size          height and width of the images, pixels
    tiles         how latents are cut for the network and the decoder; None: never
    raises        ValueError for a size that the strides of first stage and U-Net do not divide
    """

    model: LatentDiffusion
    first_stage: FirstStage
    latent_scale: float
    sampler: SamplerConfig
    size: tuple[int, int]
    seed: int
    tiles: Tiles | None = None

    def __post_init__(self) -> None:
        f, unet = self.first_stage.factor, self.model.config.unet.factor
        _require_multiples(self.size, f * unet, f"the first stage's factor {f} times the U-Net's {unet}")
        if self.tiles is not None and self.tiles.size % unet:
            raise ValueError(f"tiles.size={self.tiles.size}; must be a multiple of the U-Net's factor {unet}")

    @torch.no_grad()
    def images(
        self,
        conditions: Sequence[Any],
        indices: Sequence[int],
        *,
        steering: Steering = UNSTEERED,
        watch: Watch | None = None,
    ) -> Tensor:
        """One image a condition, (B, 3, height, width) in [-1, 1], on the model's device.

        conditions  what the conditioner prepares; None each for an unconditional model
        indices     image i draws its noise from stream indices[i]
        steering    where inpainting, the known pixels come back as they were given
        watch       told of every step; `decode` makes pictures of the latents in its frames
        """
        device = next(self.model.parameters()).device
        steering = steering.fitted(len(indices), self.size, device)
        index_B = torch.tensor(indices, dtype=torch.int64, device=device)
        shape = self.first_stage.config.latent_shape(*self.size)
        timesteps = self.sampler.timesteps(self.model.schedule, steering.strength)
        denoise, z_BCHW = self._steered(
            steering,
            self._denoiser(conditions, shape[1:], device),
            rng.normal(self.seed, "sample/start", index_B, shape),
            torch.full_like(index_B, timesteps[0]),
        )
        z_BCHW = self.sampler.build(self.model.schedule, timesteps)(
            denoise,
            z_BCHW,
            noise=lambda step, like: rng.normal(self.seed, f"sample/step {step}", index_B, tuple(like.shape[1:])),
            watch=watch,
        )
        return steering.composited(self.decode(z_BCHW))

    def batches(self, conditions: Sequence[Any], batch: int, first_index: int = 0) -> Iterator[Tensor]:
        """Images of any number of conditions, `batch` at a time; condition i is image first_index + i."""
        for start in range(0, len(conditions), batch):
            part = conditions[start : start + batch]
            yield self.images(part, range(first_index + start, first_index + start + len(part)))

    @torch.no_grad()
    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Images of scaled latents, such as those of a `Frame`: (B, 3, H, W) in [-1, 1]."""
        latents_BCHW = z_BCHW / self.latent_scale
        if self.tiles is None:
            return self.first_stage.decode(latents_BCHW).clamp(-1, 1)
        return decode_in_tiles(self.first_stage, latents_BCHW, self.tiles).clamp(-1, 1)

    def _steered(self, steering: Steering, denoise: Denoise, noise_BCHW: Tensor, t_B: Tensor) -> tuple[Denoise, Tensor]:
        """What to walk with, and from where: latents at the level of the first timestep, t_B."""
        schedule, z_BCHW = self.model.schedule, noise_BCHW
        if steering.guide is not None:
            denoise = guided_by_image(denoise, schedule, self._distance(steering.guide), steering.guide.scale)
        if steering.start_BCHW is not None:
            z_BCHW = schedule.noised(self._encoded(steering.start_BCHW), noise_BCHW, t_B)
        if steering.known_BCHW is not None and steering.paint_B1HW is not None:
            known_z_BCHW = self._encoded(steering.known_BCHW)
            # A cell with any pixel to paint is painted: kept, it would show what it was encoded from.
            paint_z_B1HW = functional.max_pool2d(steering.paint_B1HW, self.first_stage.factor)
            z_BCHW = torch.lerp(schedule.noised(known_z_BCHW, noise_BCHW, t_B), z_BCHW, paint_z_B1HW)
            denoise = keep_known(denoise, known_z_BCHW, paint_z_B1HW)
        return denoise, z_BCHW

    def _encoded(self, images_BCHW: Tensor) -> Tensor:
        return self.first_stage.encode(images_BCHW).mean * self.latent_scale

    def _distance(self, guide: ImageGuide) -> Callable[[Tensor], Tensor]:
        """From an estimate of z_0, decoded and reduced to the guide's size, to the guide."""

        def distance(z_0_BCHW: Tensor) -> Tensor:
            # Whole, whatever the tiles: the gradient needs all of a decoder's activations at once.
            images_BCHW = self.first_stage.decode(z_0_BCHW / self.latent_scale)
            sides = guide.images_BCHW.shape[-2:]
            images_BCHW = functional.interpolate(images_BCHW, size=sides, mode="bicubic", antialias=True)
            return guide.distance(images_BCHW, guide.images_BCHW.expand_as(images_BCHW))

        return distance

    def _denoiser(self, conditions: Sequence[Any], cells: tuple[int, int], device: torch.device) -> Denoise:
        """The guided denoiser for these conditions; the conditioner runs once, not once a step.

        cells  height and width of the latents
        """
        conditioner = self.model.conditioner
        parts = (self._network, self.model.schedule, self.model.objective)
        if conditioner is None:
            return guided_denoiser(*parts, {})
        inputs = conditioner.prepare(conditions).to(device)
        conditional = self.model.sampling_conditions(inputs)
        _require_cells(conditional, cells)
        if self.sampler.guidance == 1:
            return guided_denoiser(*parts, conditional)
        everywhere = torch.ones(len(inputs), dtype=torch.bool, device=device)
        unconditional = self.model.sampling_conditions(conditioner.dropped(inputs, everywhere))
        guidance, rescale = self.sampler.guidance, self.sampler.guidance_rescale
        return guided_denoiser(*parts, conditional, unconditional, guidance, rescale)

    def _network(
        self, z_BCHW: Tensor, t_B: Tensor, *, concat_BCHW: Tensor | None = None, **conditions: Tensor
    ) -> Tensor:
        """The model's network, in tiles where there are any; what is concatenated is cut along with the latent."""
        maps = {"z_BCHW": z_BCHW} if concat_BCHW is None else {"z_BCHW": z_BCHW, "concat_BCHW": concat_BCHW}
        network = partial(self.model.network, t_B=t_B, **conditions)
        return network(**maps) if self.tiles is None else tiled(network, self.tiles, maps)


def _put(
    name: str, images_BCHW: Tensor | None, *, batch: int, size: tuple[int, int], device: torch.device
) -> Tensor | None:
    if images_BCHW is None:
        return None
    height, width = images_BCHW.shape[-2:]
    if (height, width) != size or len(images_BCHW) not in (1, batch):
        raise ValueError(
            f"steering.{name}: {len(images_BCHW)} of {height} x {width}, to draw {batch} of {size[0]} x {size[1]}; "
            f"give one or {batch} of that size"
        )
    return images_BCHW.to(device)


def _require_multiples(size: tuple[int, int], step: int, why: str) -> None:
    if min(size) < 1 or any(side % step for side in size):
        fitting = " or ".join(" x ".join(str(max(side // step + more, 1) * step) for side in size) for more in (0, 1))
        raise ValueError(
            f"size={size[0]} x {size[1]}; both sides must be multiples of {step} ({why}), such as {fitting}"
        )


def _require_cells(conditions: Mapping[str, Tensor], cells: tuple[int, int]) -> None:
    concat_BCHW = conditions.get("concat_BCHW")
    if concat_BCHW is not None and concat_BCHW.shape[-2:] not in (cells, (1, 1)):
        height, width = concat_BCHW.shape[-2:]
        raise ValueError(
            f"the conditions are maps of {height} x {width} latent cells, the images of {cells[0]} x {cells[1]}; "
            "give maps of the images' size, or another size="
        )
