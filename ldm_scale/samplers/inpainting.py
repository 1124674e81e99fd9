"""Inpainting by compositing latents, by a model not trained for it (Lugmayr et al. 2022, without resampling).

Knows neither images nor first stages: what is known is a latent, and what is to be painted a map of its size.

Shape letters: B batch, C channels, H W latent height and width.
"""

import torch
from torch import Tensor

from ldm_scale.samplers.base import Denoise


def keep_known(denoise: Denoise, known_z_BCHW: Tensor, paint_B1HW: Tensor) -> Denoise:
    """A `Denoise` that is sure of the known cells.

    Every sampler moves to alpha_s z_0 + sigma_s noise, with the noise that is in z_t or fresh. Where z_0 is the known
    latent at every step, that is the known latent noised to level s: just what compositing would put there after the
    step. So no sampler needs to know of it, and the painted cells see their surroundings at their own level of noise.

    known_z_BCHW  what the cells outside the painted part hold, scaled as the network's latents
    paint_B1HW    1 to paint a cell, 0 to keep it; between them the two estimates are mixed
    """

    def kept(z_BCHW: Tensor, t: int) -> Tensor:
        return torch.lerp(known_z_BCHW, denoise(z_BCHW, t), paint_B1HW)

    return kept
