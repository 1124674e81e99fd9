"""Tiles: what is local stays what it was, and every position is told in full."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm_scale.latent_diffusion.tiles import Tiles, shares, tiled


@given(data=st.data(), length=st.integers(1, 60), size=st.integers(1, 24), factor=st.sampled_from([1, 2, 4]))
def test_shares_sum_to_one_everywhere(data: st.DataObject, length: int, size: int, factor: int):
    tiles = Tiles(size=size, overlap=data.draw(st.integers(0, size - 1)))
    share_NL, starts = shares(length, tiles, factor=factor), tiles.starts(length)
    assert share_NL.shape == (len(starts), factor * length)
    torch.testing.assert_close(share_NL.sum(0), torch.ones(factor * length))
    assert share_NL.min() >= 0
    assert starts[-1] == max(length - size, 0)
    for start, share_L in zip(starts, share_NL, strict=True):  # nothing is told from outside a tile
        told = share_L.nonzero().flatten()
        assert factor * start <= told.min() and told.max() < factor * (start + size)


def test_the_outer_quarter_of_an_overlap_counts_for_nothing_and_shares_fade():
    share_NL = shares(20, Tiles(size=12, overlap=8))
    first = share_NL[0]  # tiles begin at 0, 4 and 8; the first shares cells 4 to 11 with the second
    assert torch.equal(first[:6], torch.ones(6))
    assert torch.equal(first[10:], torch.zeros(10))
    assert (first.diff() <= 1e-6).all()
    assert first.diff().abs().max() < 0.5


class Local(nn.Module):
    """Convolutions that reach 3 cells, and double the sides where asked."""

    def __init__(self, double: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(4, 16, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2) if double else nn.Identity(),
            nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 4, 3, padding=1),
        )  # fmt: skip

    def forward(self, z_BCHW: torch.Tensor, concat_BCHW: torch.Tensor | None = None) -> torch.Tensor:
        return self.layers(z_BCHW if concat_BCHW is None else z_BCHW + concat_BCHW)


@torch.no_grad()
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("sides", [(37, 29), (20, 44), (64, 7)])
def test_a_local_network_is_the_same_in_tiles(double: bool, sides: tuple[int, int]):
    network, z = Local(double), torch.randn(2, 4, *sides)
    everywhere = torch.randn(2, 4, 1, 1)
    for maps in ({"z_BCHW": z}, {"z_BCHW": z, "concat_BCHW": torch.randn_like(z)},
                 {"concat_BCHW": everywhere, "z_BCHW": z}):  # fmt: skip
        whole = network(**maps)
        in_tiles = tiled(network, Tiles(size=20, overlap=12), maps)
        torch.testing.assert_close(in_tiles, whole, rtol=0, atol=1e-5)
        too_narrow = tiled(network, Tiles(size=20, overlap=2), maps)
        assert (too_narrow - whole).abs().max() > 1e-3


@torch.no_grad()
def test_what_fits_in_one_tile_is_bit_for_bit_the_same():
    network, z = Local(double=False), torch.randn(1, 4, 16, 11)
    assert torch.equal(tiled(network, Tiles(size=16, overlap=5), {"z_BCHW": z}), network(z))


def test_gradients_flow_through_tiles():
    network, z = Local(double=True).double(), torch.randn(1, 4, 26, 20, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 4, 52, 40, dtype=torch.float64)
    run = partial(tiled, network, Tiles(size=20, overlap=12))
    (slope,) = torch.autograd.grad((run({"z_BCHW": z}) * weight).sum(), z)
    (expected,) = torch.autograd.grad((network(z) * weight).sum(), z)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size, overlap, message", [(0, 0, "tiles.size=0"), (8, 8, "tiles.overlap=8"), (8, -1, "-1")])
def test_tiles_that_cannot_cover_are_refused(size: int, overlap: int, message: str):
    with pytest.raises(ValueError, match=message):
        Tiles(size=size, overlap=overlap)
