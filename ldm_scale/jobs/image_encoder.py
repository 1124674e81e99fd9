"""A first stage as the cache uses it: batches of pixels to what is stored, and the audit that decodes some of it again.

Letters: B images of a batch, M channels of the moments, H W height and width of images, h w of latents.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldm_scale.core.tensors import from_uint8
from ldm_scale.data.cache import Audit, LatentStatistics
from ldm_scale.evaluation.reconstruction import psnr
from ldm_scale.first_stage.base import FirstStage, Moments, MomentsKind
from ldm_scale.images.resize import Border
from ldm_scale.jobs.schemas.precompute import Precision, PrecomputeConfig

_WHITE, _WHITE_SHARE = 225, 0.95  # brightness of a bar's pixels in every channel; how many of them are so bright
_BAR = 16  # a bar takes at least one so-many-th of the side
_FEWEST = 32  # images below which the share of white bars is not judged


class AuditFailed(RuntimeError):
    """A shard whose latents are not those of its images."""


class ImageEncoder:
    """Encodes batches in the precision asked for, compiled if asked for."""

    def __init__(
        self, config: PrecomputeConfig, first_stage: FirstStage, kind: MomentsKind, device: torch.device
    ) -> None:
        self.batch, self._padded, self._device = config.batch, config.compile, device
        self._half_way = config.precision is Precision.bfloat16
        self._first_stage, self._kind = first_stage.to(device), kind
        self._pack: Callable[[Tensor], Tensor] = self._encode
        if config.compile:
            self._pack = torch.compile(self._encode)
        if not self._half_way:
            torch.backends.cudnn.allow_tf32 = False  # torch's default, which rounds to 10 bits

    @torch.no_grad()
    def __call__(self, pixels_BHWC: Tensor, *, mirrored: bool = False) -> Tensor:
        """(B, H, W, 3) uint8 pixels to packed moments (B, M, h, w) float16, on the device."""
        images_BCHW = self._images(pixels_BHWC)
        if mirrored:
            images_BCHW = images_BCHW.flip(-1)
        if self._padded and (lacking := self.batch - len(images_BCHW)):  # another size would be compiled again
            images_BCHW = torch.cat((images_BCHW, images_BCHW[-1:].expand(lacking, -1, -1, -1)))
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half_way):
            packed_BMhw = self._pack(images_BCHW)
        return packed_BMhw[: len(pixels_BHWC)].half()

    @torch.no_grad()
    def decode(self, stored_BMhw: Tensor) -> Tensor:
        """Images (B, 3, H, W) of the means of what was stored; float32."""
        return self._first_stage.decode(Moments.unpack(stored_BMhw, self._kind).mean)

    @torch.no_grad()
    def squared_error(self, pixels_BHWC: Tensor, stored_BMhw: Tensor) -> tuple[float, float]:
        """Of the stored means against float32 arithmetic: sum of squares of the difference, and of float32's own."""
        if not self._half_way:
            return 0.0, 1.0
        with torch.backends.cudnn.flags(allow_tf32=False):
            exact_BChw = self._first_stage.encode(self._images(pixels_BHWC)).mean
        difference_BChw = Moments.unpack(stored_BMhw, self._kind).mean - exact_BChw
        return float(difference_BChw.square().sum()), float(exact_BChw.square().sum())

    def pinned(self, pixels_BHWC: Tensor) -> Tensor:
        """In memory from which copies to the device need not be waited for."""
        return pixels_BHWC.pin_memory() if self._device.type == "cuda" else pixels_BHWC

    def _encode(self, images_BCHW: Tensor) -> Tensor:
        return self._first_stage.encode(images_BCHW).pack()

    def _images(self, pixels_BHWC: Tensor) -> Tensor:
        return from_uint8(pixels_BHWC.to(self._device, non_blocking=True)).permute(0, 3, 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """What decoding some images of a shard again found."""

    images: int
    psnr: float
    """Mean over the images, dB."""
    float32_error: float
    """Of the moments, against float32 arithmetic: root mean square, relative; 0 where they are float32."""


class Auditor:
    """Some images of one shard, evenly spread, with the latents that were stored of them; and the gates."""

    def __init__(self, config: PrecomputeConfig, border: Border, samples: int) -> None:
        self._config, self._border = config, border
        self._every = max(1, samples // config.audit)
        self._seen, self._with_bars = 0, 0
        self._pixels: list[Tensor] = []
        self._stored: list[Tensor] = []

    def take(self, pixels_BHWC: Tensor, stored_BMhw: Tensor, *, with_bars: int) -> None:
        """Keep those images of a batch whose turn it is; `with_bars` of the batch have white bars."""
        turns = range(-self._seen % self._every, len(pixels_BHWC), self._every)
        self._seen += len(pixels_BHWC)
        self._with_bars += with_bars
        for place in turns[: self._config.audit - len(self._pixels)]:
            self._pixels.append(pixels_BHWC[place])
            self._stored.append(stored_BMhw[place])

    def decode(self, encoder: ImageEncoder) -> Decoded | None:
        """Decode what was kept and compare; None where there was nothing."""
        if not self._pixels:
            return None
        found: list[Tensor] = []
        error, size = 0.0, 0.0
        for start in range(0, len(self._pixels), encoder.batch):
            pixels_BHWC = torch.stack(self._pixels[start : start + encoder.batch])
            stored_BMhw = torch.stack(self._stored[start : start + encoder.batch])
            # The range of pixels is written out once more: `from_uint8` is among what is audited.
            wanted_BCHW = (pixels_BHWC.float() * (2 / 255) - 1).permute(0, 3, 1, 2)
            found.append(psnr(encoder.decode(stored_BMhw).cpu(), wanted_BCHW))
            errors = encoder.squared_error(pixels_BHWC, stored_BMhw)
            error, size = error + errors[0], size + errors[1]
        return Decoded(
            images=len(self._pixels), psnr=float(torch.cat(found).mean()), float32_error=(error / size) ** 0.5
        )

    def judge(self, where: str, decoded: Decoded, statistics: LatentStatistics) -> Audit:
        """What the manifest says of the audit.

        raises  AuditFailed naming the shard, the number and the gate
        """
        config, mean, std = self._config, statistics.mean, statistics.std
        low, high = config.latent_std
        if decoded.psnr < config.min_psnr:
            raise AuditFailed(
                f"{where}: {decoded.images} images decoded from their latents reach {decoded.psnr:.1f} dB, below "
                f"precompute.min_psnr={config.min_psnr}: wrong first stage, normalisation, scale or images"
            )
        if not low <= std <= high:
            raise AuditFailed(
                f"{where}: its latents have standard deviation {std:.4g}, outside precompute.latent_std={[low, high]}: "
                "wrong first stage, normalisation or scale"
            )
        if abs(mean) > config.max_latent_mean * std:
            raise AuditFailed(
                f"{where}: its latents have mean {mean:.4g} and standard deviation {std:.4g}, more than "
                f"precompute.max_latent_mean={config.max_latent_mean} apart: wrong first stage or normalisation"
            )
        if self._border is not Border.keep and self._with_bars > config.max_white_bars * max(self._seen, _FEWEST):
            raise AuditFailed(
                f"{where}: {self._with_bars} of {self._seen} images still have white bars after data.transform."
                f"border={self._border.value}, above precompute.max_white_bars={config.max_white_bars}: their json "
                "lacks original_width and original_height, by which bars are found. Make the shards without padding, "
                "or say data.transform.border=keep in every job"
            )
        return Audit(images=decoded.images, psnr=decoded.psnr, latent_mean=mean, latent_std=std)


def has_white_bars(pixels_HWC: np.ndarray) -> bool:
    """Whether a square looks padded: thick white bars at one pair of edges, picture at both of the others.

    An object on white has white at all edges, and does not count.
    """
    white_HW: np.ndarray = np.all(pixels_HWC >= _WHITE, axis=-1)
    return _is_padded(white_HW) or _is_padded(white_HW.T)


def _is_padded(white_HW: np.ndarray) -> bool:
    bar = max(1, len(white_HW) // _BAR)
    bars = white_HW[:bar], white_HW[-bar:]
    others = white_HW[:, :1], white_HW[:, -1:]
    return all(part.mean() >= _WHITE_SHARE for part in bars) and all(part.mean() < _WHITE_SHARE for part in others)
