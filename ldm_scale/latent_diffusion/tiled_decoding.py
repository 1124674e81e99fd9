"""Decoding a latent too large for memory, a tile at a time, to the picture that decoding it whole would give.

Tiles that are decoded by themselves differ in more than their edges: attention misses the rest of the picture, and
group norms take the statistics of the tile, which turns an empty tile's faint traces into things, and shifts colours
from tile to tile. So what attends runs on the whole, at the latent's resolution, where it is cheap; and every norm
behind it waits until all tiles have told their share of its statistics.

Shape letters: B batch, C channels, G groups of a norm, H W height and width, T tiles.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm_scale.first_stage.base import FirstStage
from ldm_scale.latent_diffusion.tiles import Grid, Tiles, tiled

Statistics = tuple[Tensor, Tensor]
"""Mean and variance of each group, (B, G)."""


@torch.no_grad()
def decode_in_tiles(first_stage: FirstStage, latents_BCHW: Tensor, tiles: Tiles) -> Tensor:
    """`first_stage.decode`, in the memory of one tile but for the smaller maps between the decoder's levels.

    Equal to it, up to rounding, where a quarter of the overlap covers what the convolutions of a level reach, and
    exactly where one tile holds all. Takes six to ten times as long: the tiles of a level with n norms run n times up
    to a norm, and overlap. Without gradients, which would keep every tile.
    """
    if max(latents_BCHW.shape[-2:]) <= tiles.size:
        return first_stage.decode(latents_BCHW)
    whole, *parts = first_stage.decoding_parts()
    h_BCHW = whole(latents_BCHW)
    for part in parts:
        scale = h_BCHW.shape[-1] // latents_BCHW.shape[-1]
        scaled = Tiles(size=scale * tiles.size, overlap=scale * tiles.overlap)
        known: dict[nn.GroupNorm, Statistics] = {}
        with _group_norms(first_stage, known):
            while _learn_next(part, Grid(scaled, h_BCHW), h_BCHW, known):
                pass
            h_BCHW = tiled(lambda tile_BCHW, part=part: part(tile_BCHW), scaled, {"tile_BCHW": h_BCHW})
    return h_BCHW


class _ReachedUnknown(Exception):
    """A tile has come to a norm whose statistics are not known yet."""

    def __init__(self, norm: nn.GroupNorm, x_BCHW: Tensor) -> None:
        super().__init__()
        self.norm, self.x_BCHW = norm, x_BCHW


@contextmanager
def _group_norms(network: nn.Module, known: Mapping[nn.GroupNorm, Statistics]) -> Iterator[None]:
    """Inside, the network's group norms take their statistics from `known`; others raise `_ReachedUnknown`."""

    def normalised(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        assert isinstance(norm, nn.GroupNorm)
        if norm not in known:
            raise _ReachedUnknown(norm, *inputs)
        mean_BC, var_BC = (one.repeat_interleave(norm.num_channels // norm.num_groups, 1) for one in known[norm])
        scale_BC = norm.weight * (var_BC + norm.eps).rsqrt()
        shift_BC = norm.bias - mean_BC * scale_BC
        return torch.addcmul(shift_BC[..., None, None], inputs[0], scale_BC[..., None, None]).to(output.dtype)

    hooks = [
        module.register_forward_hook(normalised) for module in network.modules() if isinstance(module, nn.GroupNorm)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _learn_next(
    part: Callable[[Tensor], Tensor], grid: Grid, h_BCHW: Tensor, known: dict[nn.GroupNorm, Statistics]
) -> bool:
    """Add the statistics of the first norm of `part` that is not known yet; False where there is none left."""
    told: list[tuple[Tensor, Tensor, Tensor]] = []
    for place in grid.places():
        try:
            part(grid.cut(h_BCHW, place))
        except _ReachedUnknown as reached:
            norm, share_HW = reached.norm, grid.share(place, grid.factor(reached.x_BCHW))
            told.append(_statistics(reached.x_BCHW.unflatten(1, (norm.num_groups, -1)).float(), share_HW))
        else:
            return False
    weight_T11, mean_TBG, var_TBG = (torch.stack(one) for one in zip(*told, strict=True))
    weight_T11 = (weight_T11 / weight_T11.sum())[:, None, None]
    mean_BG = (weight_T11 * mean_TBG).sum(0)
    known[norm] = mean_BG, (weight_T11 * (var_TBG + (mean_TBG - mean_BG).square())).sum(0)
    return True


def _statistics(x_BGCHW: Tensor, share_HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one tile: how many positions it counts for, and over these the mean and variance of each group, (B, G)."""
    weight = share_HW.sum()
    mean_BG = (x_BGCHW.mean(2) * share_HW).sum((-2, -1)) / weight
    deviation_BGCHW = x_BGCHW - mean_BG[..., None, None, None]
    return weight, mean_BG, (deviation_BGCHW.square().mean(2) * share_HW).sum((-2, -1)) / weight
