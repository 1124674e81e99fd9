import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from ldm_scale.evaluation.reconstruction import detail, psnr, ssim


@pytest.fixture(params=[(3, 32, 32), (1, 17, 40), (3, 11, 11)])
def pairs(request) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    references = torch.nn.functional.avg_pool2d(
        torch.randn(4, *request.param, generator=generator), 3, stride=1, padding=1
    ).clamp(-1, 1)
    strength = torch.tensor([0.01, 0.1, 0.3, 1.0])[:, None, None, None]
    noise = torch.randn(references.shape, generator=generator)
    return (references + strength * noise).clamp(-1, 1), references


def unit(image: torch.Tensor) -> np.ndarray:
    return ((image.double() + 1) / 2).numpy()


def test_psnr_equals_scikit_image_and_torchmetrics(pairs):
    ours = psnr(*pairs)
    assert ours.shape == (4,)
    assert (ours.diff() < 0).all()
    for value, image, reference in zip(ours.tolist(), *pairs, strict=True):
        assert value == pytest.approx(peak_signal_noise_ratio(unit(reference), unit(image), data_range=1), rel=1e-5)
        assert value == pytest.approx(float(torchmetrics_psnr(image, reference, data_range=2.0)), rel=1e-4)


def test_psnr_closed_form():
    references = torch.zeros(2, 3, 8, 8)
    images = references + torch.tensor([0.02, 0.2])[:, None, None, None]
    torch.testing.assert_close(psnr(images, references), torch.tensor([40.0, 20.0]), rtol=1e-5, atol=0)
    assert psnr(images, images).tolist() == [math.inf, math.inf]
    assert psnr(torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2, 2)).tolist() == [0.0]


def test_ssim_equals_scikit_image(pairs):
    ours = ssim(*pairs)
    assert ours.shape == (4,)
    for value, image, reference in zip(ours.tolist(), *pairs, strict=True):
        theirs = structural_similarity(
            unit(reference), unit(image), channel_axis=0, data_range=1,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        assert value == pytest.approx(theirs, abs=2e-6)


def test_ssim_of_a_copy_is_one_and_falls_with_noise(pairs):
    torch.testing.assert_close(ssim(pairs[1], pairs[1]), torch.ones(4), rtol=0, atol=1e-6)
    assert (ssim(*pairs).diff() < 0).all()


@pytest.mark.parametrize("score", [psnr, ssim])
def test_an_image_is_scored_alone_and_clamped(score, pairs):
    images, references = pairs
    alone = torch.cat([score(images[i : i + 1], references[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, score(images, references), rtol=1e-5, atol=1e-6)
    loud = images * 3
    torch.testing.assert_close(score(loud, references), score(loud.clamp(-1, 1), references))
    assert score(images.bfloat16(), references.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("score", [psnr, ssim])
def test_shapes_that_differ_are_refused(score):
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\).*\(1, 3, 16, 16\)"):
        score(torch.zeros(2, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def test_ssim_of_a_tiny_image_is_refused():
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(torch.zeros(1, 3, 8, 16), torch.zeros(1, 3, 8, 16))


def test_detail_by_hand_and_against_a_convolution():
    """Values of 0 and 1 in turn have a Laplacian of 4 or -4 everywhere; a ramp and an even image have none."""
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(9.0), indexing="ij")
    board, ramp = ((rows + columns) % 2 * 2 - 1), (rows + 2 * columns) / 16 - 1
    assert detail(board.expand(2, 3, 8, 9)).tolist() == [16.0, 16.0]
    assert detail(torch.stack((ramp, torch.full_like(ramp, 0.3)))[:, None]) == pytest.approx(torch.zeros(2), abs=1e-12)
    images = torch.rand(2, 1, 8, 9) * 2 - 1
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    expected = torch.nn.functional.conv2d((images + 1) / 2, kernel).square().mean((1, 2, 3))
    torch.testing.assert_close(detail(images), expected)


def test_detail_falls_with_blur_and_rises_with_noise(pairs):
    _, images = pairs
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    noisy = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert (detail(blurred) < detail(images)).all() and (detail(images) < detail(noisy)).all()
