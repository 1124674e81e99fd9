"""A function of maps, run over overlapping tiles and blended: any size, in the memory of one tile.

Denoising in tiles averages at every step what neighbours say of the cells between them, so that they go on to agree
(MultiDiffusion, Bar-Tal et al. 2023, section 3). Convolutions see the same in a tile as in the whole, but for its edge;
attention and the statistics of group norms see the tile alone. Decoding (tiled_decoding.py) is made to see the whole.

Shape letters: B batch, C channels, H W height and width, N tiles along an axis, L positions along it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

Place = tuple[int, int]
"""Row and column of a tile among the tiles."""


@dataclass(kw_only=True, slots=True)
class Tiles:
    """How a latent is cut."""

    size: int
    """Side of a tile, in latent cells: a multiple of the U-Net's factor. The side of training suits attention best."""
    overlap: int
    """Cells that neighbours share. The outer quarter of them, where a tile lacks its surroundings, counts for nothing;
    over the inner half one tile fades into the next."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"tiles.size={self.size}; must be at least 1 latent cell")
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"tiles.overlap={self.overlap}; must lie in 0 ... tiles.size - 1 = {self.size - 1}")

    def starts(self, length: int) -> list[int]:
        """First cell of each tile along an axis; the last tile is moved inward, so that it ends where the axis does."""
        last = max(length - self.size, 0)
        return [*range(0, last, self.size - self.overlap), last]


class Grid:
    """The tiles of maps of one height and width, and of maps whose sides are a whole factor larger."""

    def __init__(self, tiles: Tiles, like_BCHW: Tensor) -> None:
        self._tiles, self._device = tiles, like_BCHW.device
        self._height, self._width = like_BCHW.shape[-2:]
        self._starts = tiles.starts(self._height), tiles.starts(self._width)
        self._shares: dict[int, tuple[Tensor, Tensor]] = {}

    def places(self) -> Iterator[Place]:
        """Every tile, as its row and column among the tiles."""
        rows, columns = self._starts
        return product(range(len(rows)), range(len(columns)))

    def factor(self, part_BCHW: Tensor) -> int:
        """How many times larger the map is that a tile of this size belongs to."""
        return part_BCHW.shape[-1] // min(self._tiles.size, self._width)

    def cut(self, one: Tensor, place: Place, factor: int = 1) -> Tensor:
        """A tile of a map: a view. A map that is the same everywhere, 1 x 1, as it is."""
        if one.shape[-2:] == (1, 1):
            return one
        top, left = (factor * starts[index] for starts, index in zip(self._starts, place, strict=True))
        size = factor * self._tiles.size
        return one[..., top : top + size, left : left + size]

    def share(self, place: Place, factor: int = 1) -> Tensor:
        """What a tile counts for at each of its positions, (H, W); over all tiles it sums to one."""
        if factor not in self._shares:
            rows_NH, columns_NW = (
                shares(length, self._tiles, factor=factor, device=self._device)
                for length in (self._height, self._width)
            )
            self._shares[factor] = rows_NH, columns_NW
        rows_NH, columns_NW = self._shares[factor]
        return self.cut(rows_NH[place[0], :, None] * columns_NW[place[1]], place, factor)


def tiled(function: Callable[..., Tensor], tiles: Tiles, maps: Mapping[str, Tensor]) -> Tensor:
    """`function(**maps)`, a tile at a time; exactly that where all fits in one tile.

    function  takes maps by these names, gives one map, of the same sides or a whole factor larger
    maps      (B, C, H, W), of one height and width; those of 1 x 1 are the same everywhere, and passed as they are
    returns   at least float32 where there are several tiles
    """
    largest = max(maps.values(), key=lambda one: one[0, 0].numel())
    assert all(one.shape[-2:] in (largest.shape[-2:], (1, 1)) for one in maps.values())
    if max(largest.shape[-2:]) <= tiles.size:
        return function(**maps)
    grid, out_BCHW = Grid(tiles, largest), None
    for place in grid.places():
        part_BCHW = function(**{name: grid.cut(one, place) for name, one in maps.items()})
        factor = grid.factor(part_BCHW)
        if out_BCHW is None:
            shape = *part_BCHW.shape[:2], *(factor * side for side in largest.shape[-2:])
            out_BCHW = part_BCHW.new_zeros(shape, dtype=torch.promote_types(part_BCHW.dtype, torch.float32))
        grid.cut(out_BCHW, place, factor).add_(part_BCHW * grid.share(place, factor))
    assert out_BCHW is not None
    return out_BCHW


def shares(length: int, tiles: Tiles, *, factor: int = 1, device: torch.device | None = None) -> Tensor:
    """What each tile along an axis counts for at each position of the output; (N, factor length), sums to one over N.

    A tile counts fully in its middle, and fades where it overlaps a neighbour along 3 u^2 - 2 u^3, whose slope is zero
    at both ends; at the ends of the axis it does not fade.
    """
    last, stride, overlap = max(length - tiles.size, 0), tiles.size - tiles.overlap, factor * tiles.overlap
    begin_N1 = factor * torch.arange(len(tiles.starts(length)), device=device)[:, None].mul(stride).clamp(max=last)
    position_L = torch.arange(factor * length, device=device) + 0.5
    from_begin_NL, to_end_NL = position_L - begin_N1, begin_N1 + factor * tiles.size - position_L
    from_begin_NL[0] = to_end_NL[-1] = torch.inf
    depth_NL = torch.minimum(from_begin_NL, to_end_NL)
    u_NL = ((depth_NL - overlap / 4) / (max(overlap, 1) / 2)).clamp(0, 1)
    share_NL = u_NL.square() * (3 - 2 * u_NL)
    return share_NL / share_NL.sum(0)
