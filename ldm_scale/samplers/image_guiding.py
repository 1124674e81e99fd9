"""Guidance of a finished model by an image: whatever the image is, as long as a distance to it has a gradient.

Rombach et al. 2022, appendix C, after Dhariwal & Nichol 2021, algorithm 2. Knows neither images nor first stages: the
distance is a function of the estimate of z_0, and decodes it if it has to.

Shape letters: B batch, C channels, H W latent height and width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_scale.diffusion.schedule import NoiseSchedule
from ldm_scale.samplers.base import Denoise


def guided_by_image(
    denoise: Denoise, schedule: NoiseSchedule, distance: Callable[[Tensor], Tensor], scale: float
) -> Denoise:
    """A `Denoise` that heads for where `distance` is small.

    eps' = eps + scale sigma_t slope, where slope = d distance(z_0(z_t)) / d z_t, through denoiser and distance: up to a
    factor, exp(-scale distance) is the likelihood of the image. Of z_0, scale sigma_t^2 / alpha_t slope is taken away.
    Multistep samplers extrapolate the slope of the steps before: they bear smaller scales than DDIM.

    distance  (B, C, H, W) estimate of z_0 -> (B,), each of its own sample alone
    scale     at least 0; 0 changes nothing
    """

    def guided(z_BCHW: Tensor, t: int) -> Tensor:
        alpha, sigma = schedule.at(t)
        if scale == 0 or alpha == 0:  # pure noise says nothing of z_0, so neither does the gradient
            return denoise(z_BCHW, t)
        with torch.enable_grad():  # samplers run without
            z_BCHW = z_BCHW.detach().requires_grad_()
            z_0_BCHW = denoise(z_BCHW, t)
            (slope_BCHW,) = torch.autograd.grad(distance(z_0_BCHW).sum(), z_BCHW)
        return z_0_BCHW.detach() - scale * sigma**2 / alpha * slope_BCHW

    return guided
