"""Images as channels that the U-Net sees beside the latent: what `conditioning.spatial.ConcatConditioner` takes.

Super-resolution (Rombach et al. 2022, section 4.4) takes the small picture in [-1, 1], of the latent's sides, as it is.
Inpainting (section 4.5) takes what is made here; the values are those of the published models as their code makes them.

Shape letters: B batch, C latent channels, H W image height and width, h w those of the latent.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ldm_scale.first_stage.base import FirstStage


@torch.no_grad()
def masked_image(first_stage: FirstStage, latent_scale: float, images_B3HW: Tensor, paint_B1HW: Tensor) -> Tensor:
    """What an inpainting model is told: the latent of what is known, and where it is not; (B, C + 1, h, w).

    The pixels to be painted are -1 (black) when the image is encoded. The latent is the mean, before any quantisation,
    scaled as the noisy one is. The last channel is the mask at the latent's size, nearest neighbour: 1 paint, -1 keep.

    images_B3HW  in [-1, 1]
    paint_B1HW   1 where pixels are to be painted, 0 where they are known
    """
    known_B3HW = torch.where(paint_B1HW > 0.5, -1.0, images_B3HW)
    z_BChw = first_stage.encode(known_B3HW).mean * latent_scale
    mask_B1hw = functional.interpolate(paint_B1HW, size=z_BChw.shape[-2:], mode="nearest")
    return torch.cat((z_BChw, 2 * mask_B1hw - 1), dim=1)
