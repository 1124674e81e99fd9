"""Encoder and decoder against diffusers' as an oracle."""

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import Decoder as TheirDecoder
from diffusers.models.autoencoders.vae import Encoder as TheirEncoder
from torch import nn

from ldm_scale.nn.autoencoder import Decoder, Encoder

WIDTHS = [16, 32, 48]


def pair(attention_factors: list[int]) -> list[tuple[nn.Module, nn.Module, torch.Tensor]]:
    """(ours, theirs, input) of the encoder and of the decoder; f = 4."""
    shape: dict[str, Any] = {
        "widths": WIDTHS, "num_res_blocks": 2, "attention_factors": attention_factors, "groups": 8
    }  # fmt: skip
    kinds = [("Attn" if 2**level in attention_factors else "", level) for level in range(3)]
    encoder = TheirEncoder(
        in_channels=3,
        out_channels=5,
        block_out_channels=tuple(WIDTHS),
        layers_per_block=2,
        norm_num_groups=8,
        double_z=True,
        down_block_types=tuple(f"{kind}DownEncoderBlock2D" if kind else "DownEncoderBlock2D" for kind, _ in kinds),
    )
    decoder = TheirDecoder(
        in_channels=5,
        out_channels=3,
        block_out_channels=tuple(WIDTHS),
        layers_per_block=2,
        norm_num_groups=8,
        up_block_types=tuple(f"{kind}UpDecoderBlock2D" if kind else "UpDecoderBlock2D" for kind, _ in reversed(kinds)),
    )
    generator = torch.Generator().manual_seed(0)
    return [
        (Encoder(3, 10, **shape), encoder, torch.randn(2, 3, 16, 24, generator=generator)),
        (Decoder(5, 3, **shape), decoder, torch.randn(2, 5, 4, 6, generator=generator)),
    ]


@torch.no_grad()
@pytest.mark.parametrize("attention_factors", [[], [2, 4]])
def test_equals_diffusers_both_ways(randomise: Any, attention_factors: list[int]):
    for ours, theirs, x in pair(attention_factors):
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
