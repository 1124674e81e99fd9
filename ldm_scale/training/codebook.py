"""How much of a codebook training uses, and entries that it does not use started again.

Codes are counted in windows of images, over all ranks. Entries that no latent took in a window are dead: no gradient
reaches them. They may start again at latents of the global batch that ends the window, drawn by position like all
else, so that ranks, world sizes and resumes agree.

Shape letters: B batch, K entries, C latent channels, M latent vectors of this rank's images, H W height and width.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_scale.core import rng
from ldm_scale.core.shares import add_up
from ldm_scale.first_stage.base import Rebuilt
from ldm_scale.first_stage.vq import perplexity, usage
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine
from ldm_scale.training.masters import MOMENTS

ENTRIES = "quantize.embedding.weight"
"""The parameter of a VQ first stage that holds its codebook."""


class CodebookWatch:
    """Told of every micro batch; the same on every rank once a window has ended."""

    def __init__(self, engine: Engine, ema: EMA, *, window: int, restart: bool, seed: int) -> None:
        """Watch the codebook that `engine` trains.

        window   images over which codes are counted
        restart  whether dead entries start again when it ends; needs whole masters on every rank (no ZeRO)
        """
        self._engine, self._ema, self._window, self._restart, self._seed = engine, ema, window, restart, seed
        self._counts_K = torch.zeros(engine.masters.shapes[ENTRIES][0], dtype=torch.int64, device=engine.device)
        self._images, self._windows = 0, 0
        self._found: dict[str, Tensor] = {}
        self._latents_BCHW: list[Tensor] = []

    def take(self, rebuilt: Rebuilt) -> dict[str, Tensor]:
        """Count the codes of one micro batch, after its `engine.step`; at the end of a window restart dead entries.

        returns  use of the codebook in the last whole window, as device scalars; nothing before the first has ended
        """
        assert rebuilt.codes is not None, "asked only where there is a codebook"
        taken_M = rebuilt.codes.indices.flatten()
        self._counts_K.index_add_(0, taken_M, torch.ones_like(taken_M))  # bincount would wait for the device
        self._images += len(rebuilt.images) * self._engine.world
        if self._restart:
            self._latents_BCHW.append(rebuilt.moments.mean.detach().float())
        if self._engine.at_boundary:
            if self._images >= self._window:
                self._end_window()
            self._latents_BCHW = []
        return self._found

    def state(self) -> dict[str, Any]:
        """What a checkpoint must carry, as JSON values. Collective."""
        return {
            "counts": _over_ranks(self._counts_K).tolist(),
            "images": self._images,
            "windows": self._windows,
            "found": {name: value.item() for name, value in self._found.items()},
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint carried, on any number of ranks."""
        counts_K = torch.tensor(state["counts"], device=self._engine.device)
        self._counts_K = counts_K if self._engine.rank == 0 else torch.zeros_like(counts_K)
        self._images, self._windows = state["images"], state["windows"]
        self._found = {name: torch.tensor(value, device=self._engine.device) for name, value in state["found"].items()}

    def _end_window(self) -> None:
        counts_K = _over_ranks(self._counts_K)
        self._found = {"train/codebook_usage": usage(counts_K), "train/codebook_perplexity": perplexity(counts_K)}
        if self._restart:
            self._start_again(counts_K == 0, self._drawn_latents(len(counts_K)))
        self._counts_K, self._images, self._windows = torch.zeros_like(counts_K), 0, self._windows + 1

    def _drawn_latents(self, count: int) -> Tensor:
        """Latent vectors drawn from all of this global batch, (count, C): image j of it lies on rank j mod world."""
        rank, world = self._engine.rank, self._engine.world
        cells_BMC = torch.cat(self._latents_BCHW).flatten(2).movedim(1, 2)
        images, cells = len(cells_BMC) * world, cells_BMC.shape[1]
        window = torch.full((1,), self._windows, device=self._engine.device)
        drawn_K = rng.integers(self._seed, "autoencoder/codebook", window, images * cells, (count,))[0]
        image_K, cell_K = drawn_K // cells, drawn_K % cells
        mine_K1 = (image_K % world == rank)[:, None]
        return _over_ranks(torch.where(mine_K1, cells_BMC[image_K // world, cell_K], 0.0))

    @torch.no_grad()
    def _start_again(self, dead_K: Tensor, fresh_KC: Tensor) -> None:
        """Set dead entries, wherever they are kept: weights, averages and, to zero, moments. NaN never gets in."""
        masters = self._engine.masters
        table = next(piece.master for piece in masters.pieces if piece.name == ENTRIES)
        dead_K1 = (dead_K & fresh_KC.isfinite().all(1))[:, None]
        for entries_KC in (masters.tensors[table], *(shadow[table] for shadow in self._ema.shadows.values())):
            entries_KC.copy_(torch.where(dead_K1, fresh_KC, entries_KC))
        for key in MOMENTS:
            masters.moments(key)[table].masked_fill_(dead_K1, 0.0)


def _over_ranks(values: Tensor) -> Tensor:
    """The sum over all ranks, in a new tensor. Collective."""
    total = values.clone()
    add_up(total)
    return total
