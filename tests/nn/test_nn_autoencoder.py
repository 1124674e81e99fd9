"""Encoder and decoder against diffusers' as an oracle."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder as TheirDecoder
from diffusers.models.autoencoders.vae import Encoder as TheirEncoder
from torch import nn

from ldm_scale.nn.attention import AttentionBlock
from ldm_scale.nn.autoencoder import Decoder, Encoder

WIDTHS = [16, 32, 48]


@dataclass(frozen=True)
class Published:
    """A row of facts.md 1.1 and 2.1; parameters, tensors and attention blocks of encoder and decoder alone."""

    channel_mult: tuple[int, ...]
    z_channels: int
    encoder: int
    decoder: int
    tensors: int
    attention_blocks: int
    attention_factors: tuple[int, ...] = ()
    moments: bool = False
    mid_attention: bool = True


F8, F16 = (1, 2, 2, 4), (1, 1, 2, 2, 4)
PUBLISHED = {
    "kl-f4": Published((1, 2, 4), 3, 22_351_238, 32_960_771, 200, 2, moments=True),
    "kl-f8": Published((1, 2, 4, 4), 4, 34_163_592, 49_490_179, 244, 2, moments=True),
    "kl-f16": Published(F16, 16, 28_265_760, 41_343_875, 338, 7, (16,), moments=True),
    "kl-f32": Published((*F16, 4), 64, 42_614_656, 61_244_803, 432, 12, (16, 32), moments=True),
    "vq-f4": Published((1, 2, 4), 3, 22_337_411, 32_960_771, 200, 2),
    "vq-f4-noattn": Published((1, 2, 4), 3, 21_285_763, 31_909_123, 180, 0, mid_attention=False),
    "vq-f8": Published(F8, 4, 27_397_764, 40_253_955, 294, 7, (8,)),
    "vq-f16": Published(F16, 8, 28_155_144, 41_307_011, 338, 7, (16,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name: str):
    row = PUBLISHED[name]
    shape: dict[str, Any] = {
        "widths": [128 * multiple for multiple in row.channel_mult],
        "num_res_blocks": 2,
        "attention_factors": list(row.attention_factors),
        "mid_attention": row.mid_attention,
        "groups": 32,
    }
    with torch.device("meta"):
        encoder = Encoder(3, 2 * row.z_channels if row.moments else row.z_channels, **shape)
        decoder = Decoder(row.z_channels, 3, **shape)
    assert sum(p.numel() for p in encoder.parameters()) == row.encoder
    assert sum(p.numel() for p in decoder.parameters()) == row.decoder
    assert len(encoder.state_dict()) + len(decoder.state_dict()) == row.tensors
    modules = (*encoder.modules(), *decoder.modules())
    assert sum(isinstance(module, AttentionBlock) for module in modules) == row.attention_blocks


def pair(attention_factors: list[int], mid_attention: bool = True) -> list[tuple[nn.Module, nn.Module, torch.Tensor]]:
    """(ours, theirs, input) of the encoder and of the decoder; f = 4."""
    shape: dict[str, Any] = {
        "widths": WIDTHS,
        "num_res_blocks": 2,
        "attention_factors": attention_factors,
        "mid_attention": mid_attention,
        "groups": 8,
    }
    kinds = [("Attn" if 2**level in attention_factors else "", level) for level in range(3)]
    encoder = TheirEncoder(
        in_channels=3,
        out_channels=5,
        block_out_channels=tuple(WIDTHS),
        layers_per_block=2,
        norm_num_groups=8,
        mid_block_add_attention=mid_attention,
        double_z=True,
        down_block_types=tuple(f"{kind}DownEncoderBlock2D" if kind else "DownEncoderBlock2D" for kind, _ in kinds),
    )
    decoder = TheirDecoder(
        in_channels=5,
        out_channels=3,
        block_out_channels=tuple(WIDTHS),
        layers_per_block=2,
        norm_num_groups=8,
        mid_block_add_attention=mid_attention,
        up_block_types=tuple(f"{kind}UpDecoderBlock2D" if kind else "UpDecoderBlock2D" for kind, _ in reversed(kinds)),
    )
    generator = torch.Generator().manual_seed(0)
    return [
        (Encoder(3, 10, **shape), encoder, torch.randn(2, 3, 16, 24, generator=generator)),
        (Decoder(5, 3, **shape), decoder, torch.randn(2, 5, 4, 6, generator=generator)),
    ]


@torch.no_grad()
@pytest.mark.parametrize("attention_factors, mid_attention", [([], True), ([2, 4], True), ([], False)])
def test_equals_diffusers_both_ways(randomise: Any, attention_factors: list[int], mid_attention: bool):
    for ours, theirs, x in pair(attention_factors, mid_attention):
        for source, target, seed in ((theirs, ours, 1), (ours, theirs, 2)):
            randomise(source, seed)
            target.eval().load_state_dict(source.state_dict(), strict=True)
            expected = theirs(x)
            assert expected.abs().max() > 0.1
            assert (ours(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_shapes_follow_the_number_of_levels():
    shape: dict[str, Any] = {"widths": [8, 8], "num_res_blocks": 1, "attention_factors": [], "groups": 4}
    assert Encoder(3, 6, **shape)(torch.zeros(1, 3, 8, 12)).shape == (1, 6, 4, 6)
    assert Decoder(2, 3, **shape)(torch.zeros(1, 2, 4, 6)).shape == (1, 3, 8, 12)


@pytest.mark.slow
def test_compiles_without_graph_breaks(randomise: Any):
    for ours, _, x in pair([4]):
        randomise(ours, 3)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), ours(x), rtol=1e-4, atol=1e-5)
