"""How faithfully an image was reconstructed: PSNR and SSIM, and how much fine detail it has; one number per image.

Images in, numbers out; knows no model. Values outside [-1, 1] are clamped, as they are when an image is written.

Shape letters: B batch, C channels, H W height and width.
"""

import torch
from torch import Tensor

_SSIM_WINDOW = 11


def psnr(images_BCHW: Tensor, references_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, (B,) in dB; infinite for an exact copy.

    images, references  (B, C, H, W) in [-1, 1], so the peak is 2
    raises              ValueError if the shapes differ
    """
    images_BCHW, references_BCHW = _unit_range(images_BCHW, references_BCHW)
    return -10 * (images_BCHW - references_BCHW).square().flatten(1).mean(1).log10()


def ssim(images_BCHW: Tensor, references_BCHW: Tensor) -> Tensor:
    """Structural similarity, (B,), 1 for an exact copy; Wang et al. 2004: 11 x 11 Gaussian window of sigma 1.5.

    Computed on [0, 1] (its brightness term has no meaning for negative values), per channel, and averaged over the
    windows that lie inside the image.

    images, references  (B, C, H, W) in [-1, 1]
    raises              ValueError if the shapes differ or a side is shorter than the window
    """
    if min(images_BCHW.shape[-2:]) < _SSIM_WINDOW:
        raise ValueError(
            f"images of {tuple(images_BCHW.shape[-2:])} pixels; SSIM needs {_SSIM_WINDOW} x {_SSIM_WINDOW}"
        )
    from torchmetrics.functional.image import structural_similarity_index_measure  # over a second to import

    images_BCHW, references_BCHW = _unit_range(images_BCHW, references_BCHW)
    _, map_BCHW = structural_similarity_index_measure(
        images_BCHW, references_BCHW, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    border = _SSIM_WINDOW // 2  # torchmetrics reflects the image there
    return map_BCHW[..., border:-border, border:-border].flatten(1).mean(1)


def detail(images_BCHW: Tensor) -> Tensor:
    """Energy of what is fine in an image: mean square of its Laplacian, (B,); 0 for one of a single colour.

    The filter passes nothing that is even or a ramp and lets the finest checkerboard through 8 times as high. The
    detail of a reconstruction against that of its original is below 1 where it is blurred, above 1 where it is noisy.

    images  (B, C, H, W) in [-1, 1], 3 pixels a side or more
    """
    images_BCHW, _ = _unit_range(images_BCHW, images_BCHW)
    inner_BCHW = images_BCHW[..., 1:-1, 1:-1]
    across_BCHW = images_BCHW[..., 1:-1, :-2] + images_BCHW[..., 1:-1, 2:]
    down_BCHW = images_BCHW[..., :-2, 1:-1] + images_BCHW[..., 2:, 1:-1]
    return (across_BCHW + down_BCHW - 4 * inner_BCHW).square().flatten(1).mean(1)


def _unit_range(images: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    if images.shape != references.shape:
        raise ValueError(f"images of shape {tuple(images.shape)} against references of {tuple(references.shape)}")
    dtype = torch.promote_types(images.dtype, torch.float32)
    return (images.to(dtype).clamp(-1, 1) + 1) / 2, (references.to(dtype).clamp(-1, 1) + 1) / 2
