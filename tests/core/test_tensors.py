import numpy as np
import torch

from ldm_scale.core import tensors


def test_all_256_pixel_values_round_trip():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(tensors.to_uint8(tensors.from_uint8(values)), values)


def test_pixels_are_scaled_as_in_the_reference():
    values = torch.arange(256, dtype=torch.uint8)
    expected = (values.numpy().astype(np.float64) / 127.5 - 1).astype(np.float32)
    pixels = tensors.from_uint8(values)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), expected, rtol=0, atol=1.2e-7)
    assert pixels[0] == -1 and pixels[255] == 1


def test_to_uint8_clamps_and_rounds_to_nearest():
    step = 2 / 255
    pixels = torch.tensor([-7.0, -1 + 0.4 * step, -1 + 0.6 * step, 1 - 0.6 * step, 1 - 0.4 * step, 9.0])
    assert tensors.to_uint8(pixels).tolist() == [0, 0, 1, 254, 255, 255]


def test_to_uint8_of_half_precision_is_computed_in_float32():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(tensors.to_uint8(tensors.from_uint8(values).half()), values)


def test_over_samples_multiplies_each_sample_by_its_own_number():
    batch, factors = torch.ones(3, 4, 2, 2), torch.tensor([1.0, 2.0, 3.0])
    product = tensors.over_samples(factors, batch) * batch
    assert product.shape == batch.shape
    assert product.flatten(1).unique(dim=1).flatten().tolist() == [1, 2, 3]
    assert tensors.over_samples(factors, torch.ones(3)).shape == (3,)
