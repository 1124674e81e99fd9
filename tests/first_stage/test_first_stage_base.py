"""Moments, latent shapes and the digest of weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_scale.first_stage.base import Moments, MomentsKind
from ldm_scale.first_stage.kl import AutoencoderKL, AutoencoderKLConfig


def toy() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKLConfig(channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4).build()


def test_sample_has_the_moments():
    moments = Moments(torch.full((1, 1, 300, 300), 3.0), torch.full((1, 1, 300, 300), 2 * 0.6931472))  # std 2
    drawn = moments.sample(torch.randn(1, 1, 300, 300, generator=torch.Generator().manual_seed(0)))
    assert drawn.mean().item() == pytest.approx(3, abs=0.03)
    assert drawn.std().item() == pytest.approx(2, abs=0.03)
    assert torch.equal(moments.sample(torch.zeros(1, 1, 300, 300)), moments.mean)


@pytest.mark.parametrize("kind", list(MomentsKind))
def test_pack_and_unpack_are_inverse_and_stored_half_becomes_float32(kind: MomentsKind):
    mean = torch.randn(2, 3, 4, 4).half()
    moments = Moments(mean, torch.randn(2, 3, 4, 4).half() if kind is MomentsKind.GAUSSIAN else None)
    assert moments.kind is kind
    packed = moments.pack()
    assert packed.shape[1] == (6 if kind is MomentsKind.GAUSSIAN else 3)
    back = Moments.unpack(packed, kind)
    assert back.kind is kind
    assert back.mean.dtype == torch.float32
    assert torch.equal(back.mean, mean.float())
    assert torch.equal(back.pack(), packed.float())


def test_certain_latents_ignore_the_noise():
    mean = torch.randn(2, 3, 4, 4)
    assert torch.equal(Moments(mean, None).sample(torch.randn(2, 3, 4, 4)), mean)


def test_odd_channels_are_no_gaussian():
    with pytest.raises(ValueError, match="7 channels"):
        Moments.unpack(torch.zeros(1, 7, 2, 2), MomentsKind.GAUSSIAN)


@given(levels=st.integers(1, 6), side=st.integers(1, 70))
def test_latent_shape_is_what_encode_gives_or_a_refusal(levels: int, side: int):
    config = AutoencoderKLConfig(channel_mult=[1] * levels, embed_dim=5)
    f = 2 ** (levels - 1)
    if side % f == 0:
        assert config.latent_shape(side) == (5, side // f, side // f)
    else:
        with pytest.raises(ValueError, match=f"image size {side} is not a multiple of .* factor {f}; .* that fit"):
            config.latent_shape(side)


def test_digest_is_of_the_weights_and_nothing_else():
    first, second = toy(), toy()
    assert first.digest() == second.digest()
    assert len(first.digest()) == 64
    assert first.eval().requires_grad_(False).digest() == second.digest()
    assert first.to(memory_format=torch.channels_last).digest() == second.digest()
    with torch.no_grad():
        bits = second.decoder.conv_out.bias.view(torch.int32)
        bits[0] ^= 1  # the last bit of one weight
    assert first.digest() != second.digest()
    assert toy().bfloat16().digest() != toy().digest()


def test_digest_knows_names():
    model = toy()
    before = model.digest()
    state = model.state_dict()
    a, b = "encoder.mid_block.resnets.0.conv1.weight", "encoder.mid_block.resnets.1.conv1.weight"
    model.load_state_dict(state | {a: state[b].clone(), b: state[a].clone()})
    assert model.digest() != before
