"""A latent decoded in tiles is the picture that it is decoded whole."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_scale.first_stage.base import FirstStage
from ldm_scale.first_stage.identity import IdentityConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.latent_diffusion.tiled_decoding import decode_in_tiles
from ldm_scale.latent_diffusion.tiles import Tiles, tiled

TILES = Tiles(size=24, overlap=16)
SHAPE: dict[str, Any] = {"channels": 8, "num_res_blocks": 1, "norm_groups": 4}
STAGES = {
    "kl_f4": AutoencoderKLConfig(**SHAPE, channel_mult=[1, 2, 2]),
    "attention_behind_the_middle": AutoencoderKLConfig(**SHAPE, channel_mult=[1, 2, 2], attention_factors=[2]),
    "attention_everywhere": AutoencoderKLConfig(**SHAPE, channel_mult=[1, 2], attention_factors=[1]),
    "vq_noattn": AutoencoderVQConfig(**SHAPE, channel_mult=[1, 2], mid_attention=False, codebook_size=64),
    "one_level": AutoencoderKLConfig(**SHAPE, channel_mult=[1]),
    "pixels": IdentityConfig(image_channels=4),
}


def stage_of(name: str) -> FirstStage:
    torch.manual_seed(1)
    stage = STAGES[name].build().requires_grad_(False)
    for module in stage.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, mean=1, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
    return stage


def lopsided(stage: FirstStage, height: int, width: int) -> Tensor:
    """Latents that are nearly empty but for a corner: a tile's statistics are nothing like the whole's."""
    generator = torch.Generator().manual_seed(2)
    z = 0.02 * torch.randn(2, stage.latent_channels, height, width, generator=generator)
    z[..., : height // 3, : width // 3] *= 100
    return z


@pytest.mark.parametrize("name", STAGES)
def test_parts_are_the_decoder(name: str):
    stage = stage_of(name)
    h = latents = lopsided(stage, 12, 8)
    for part in stage.decoding_parts():
        h = part(h)
    assert torch.equal(h, stage.decode(latents))


def test_all_that_attends_is_in_the_first_part():
    counts = {name: len(stage_of(name).decoding_parts()) for name in STAGES}
    assert counts == {
        "kl_f4": 3, "attention_behind_the_middle": 2, "attention_everywhere": 1, "vq_noattn": 2, "one_level": 1,
        "pixels": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("sides", [(32, 40), (48, 24), (33, 20)])
def test_tiles_give_the_picture_of_the_whole(name: str, sides: tuple[int, int]):
    stage = stage_of(name)
    latents = lopsided(stage, *sides)
    whole = stage.decode(latents)
    torch.testing.assert_close(decode_in_tiles(stage, latents, TILES), whole, rtol=0, atol=1e-3 * float(whole.std()))


def seam(images: Tensor, borders: list[int]) -> float:
    """Mean step between the columns at tile borders, over that between all others."""
    steps_W = images.diff(dim=-1).abs().mean((0, 1, 2))
    at_border = torch.zeros_like(steps_W, dtype=torch.bool)
    at_border[[border - 1 for border in borders]] = True
    return float(steps_W[at_border].mean() / steps_W[~at_border].mean())


@pytest.mark.parametrize("overlap, error, step", [(16, 1e-4, 1e-3), (8, 0.02, 0.02), (4, 0.5, 0.1)])
def test_borders_do_not_show(overlap: int, error: float, step: float):
    """Error in units of the picture's standard deviation; step, of `seam` against the whole picture's own."""
    stage, tiles = stage_of("kl_f4"), Tiles(size=24, overlap=overlap)
    latents = torch.randn(2, 4, 24, 96, generator=torch.Generator().manual_seed(3))
    latents[..., 48:] *= 0.1
    whole, ours = stage.decode(latents), decode_in_tiles(stage, latents, tiles)
    blended = tiled(stage.decode, tiles, {"latents_BCHW": latents})
    ends = [4 * (start + at) for start in tiles.starts(96)[1:] for at in (0, overlap // 2, overlap)]
    assert (ours - whole).abs().max() < error * whole.std()
    assert seam(ours, ends) == pytest.approx(seam(whole, ends), rel=step)
    assert (blended - whole).abs().max() > 10 * (ours - whole).abs().max()


def test_hooks_are_gone_afterwards_even_after_an_error():
    stage = stage_of("kl_f4")
    latents = lopsided(stage, 32, 32)
    before = stage.decode(latents)
    decode_in_tiles(stage, latents, TILES)
    last = stage.decoder.conv_out
    stage.decoder.conv_out = nn.Conv2d(1, 1, 1)
    with pytest.raises(RuntimeError):
        decode_in_tiles(stage, latents, TILES)
    stage.decoder.conv_out = last
    assert torch.equal(stage.decode(latents), before)
