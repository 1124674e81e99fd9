"""Embeddings and attention primitives against closed forms and figures in facts.md."""

import math

import pytest
import torch
from torch import nn

from ldm_scale.nn.attention import GEGLU, attend, to_image, to_tokens
from ldm_scale.nn.blocks import DownsampleRightBottom, Pointwise, require_group_widths, require_reached, timestep_waves


def test_timestep_waves_have_the_reference_values():
    waves = timestep_waves(torch.tensor([1]), 320)[0]
    assert waves.shape == (320,)
    expected = torch.tensor([0.5403023, 0.5865038, 0.6284394, 0.8414710, 0.8099465, 0.7778585])
    torch.testing.assert_close(waves[[0, 1, 2, 160, 161, 162]], expected, rtol=0, atol=1e-6)


def test_timestep_waves_tell_the_last_timesteps_apart_in_any_dtype():
    """In bfloat16 999 and 1000 are one number, so the waves may not be computed there."""
    waves = timestep_waves(torch.tensor([998, 999]), 64)
    assert waves.dtype == torch.float32
    assert waves[0, 0].item() == pytest.approx(math.cos(998), abs=1e-5)
    assert (waves[0] - waves[1]).abs().max() > 0.5


def test_attend_is_softmax_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 12, generator=generator, dtype=torch.float64) for n in (5, 7, 7))
    expected = torch.empty(2, 5, 12, dtype=torch.float64)
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / 2, dim=-1)  # 4 channels a head: scale 1/2
        expected[..., part] = weights @ v[..., part]
    torch.testing.assert_close(attend(q, k, v, heads=3), expected)


def test_geglu_takes_the_first_half_as_value_and_the_exact_gelu():
    geglu = GEGLU(1, 1)
    with torch.no_grad():
        geglu.proj.weight.copy_(torch.tensor([[1.0], [2.0]]))
        geglu.proj.bias.zero_()
    x = 0.7
    gelu = 2 * x * 0.5 * (1 + math.erf(2 * x / math.sqrt(2)))
    assert geglu(torch.tensor([[[x]]])).item() == pytest.approx(x * gelu, rel=1e-6)


def test_tokens_are_pixels_row_by_row_and_back():
    image = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    tokens = to_tokens(image)
    assert torch.equal(tokens[1, 2 * 5 + 3], image[1, :, 2, 3])
    assert torch.equal(to_image(tokens, like=image), image)


def test_channels_last_images_become_tokens_without_a_copy():
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert to_tokens(image).is_contiguous()
    assert to_image(to_tokens(image).clone(), like=image).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pointwise_is_a_convolution_of_size_one(layout: torch.memory_format):
    torch.manual_seed(0)
    pointwise = Pointwise(6, 10)
    image = torch.randn(2, 6, 4, 5).to(memory_format=layout)
    expected = nn.functional.conv2d(image, pointwise.weight, pointwise.bias)
    out = pointwise(image)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()
    assert pointwise.weight.grad.stride() == pointwise.weight.stride()  # or DDP copies it into its bucket, warning


def test_first_stage_downsampling_pads_right_and_bottom_only():
    down = DownsampleRightBottom(1)
    with torch.no_grad():
        down.conv.weight.zero_()
        down.conv.weight[0, 0, 0, 0] = 1.0  # picks the top left pixel of every window
        down.conv.bias.zero_()
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(down(image), image[..., ::2, ::2])


@pytest.mark.parametrize(
    "groups, widths, fits", [(32, [64, 96], True), (32, [64, 80], False), (0, [64], False), (16, [16], True)]
)
def test_groups_must_divide_every_width(groups: int, widths: list[int], fits: bool):
    if fits:
        require_group_widths("unet.norm_groups", groups, widths)
        nn.GroupNorm(groups, widths[0])
    else:
        with pytest.raises(ValueError, match=rf"^unet\.norm_groups={groups}; must divide .*{widths[-1]}"):
            require_group_widths("unet.norm_groups", groups, widths)


@pytest.mark.parametrize("factors", [[3], [8], [1, 1], [0]])
def test_attention_at_a_factor_that_no_level_has_is_refused(factors: list[int]):
    require_reached("unet.attention_factors", [4, 1], levels=3)
    with pytest.raises(ValueError, match=r"unet\.attention_factors=.*\[1, 2, 4\]"):
        require_reached("unet.attention_factors", factors, levels=3)
