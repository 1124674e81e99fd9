"""How hard each part of a model is pulled, and how far a step moves it, on the steps that a line is written of.

AdamW's own step is watched, by torch's hooks: there every engine has what is asked for, gradients just before and
weights with their moments just after. Nothing of what was before is kept, since what AdamW did (Loshchilov & Hutter
2019, algorithm 2) can be solved for the weights w' that came out:

    w' = (1 - a) w - s,  a = rate decay,  s = rate m_hat / (sqrt(v_hat) + eps)    so    w' - w = -(s + a w') / (1 - a)

Every rank adds up its share of the masters.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_scale.core import runtime
from ldm_scale.training.masters import MOMENTS, Masters, Piece, Ratio, chunked, laid_out, share, square_sum


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Pieces of one part; of weights and both moments, a view of each."""

    part: str
    pieces: list[Piece]
    views: list[list[Tensor]]


class Movement:
    """Watches the optimizer of one set of masters, while it is told to."""

    def __init__(self, masters: Masters, part_of: Callable[[str], str]) -> None:
        """`part_of` gives the part of the model that a parameter belongs to, by their names."""
        self._masters = masters
        self._parts: dict[str, list[Piece]] = {part_of(name): [] for name in masters.shapes}
        for piece in share(masters, runtime.rank(), runtime.world()):
            self._parts[part_of(piece.name)].append(piece)
        self._chunks: dict[tuple[int, ...], list[_Chunk]] = {}
        self._watching = False
        self._forget()
        masters.adam.register_step_pre_hook(self._pulled)
        masters.adam.register_step_post_hook(self._moved)

    def watch(self, on: bool) -> None:
        """Whether the next step is watched."""
        self._watching = on
        if on:
            self._forget()

    def numbers(self, grad_norm: Tensor) -> dict[str, Ratio]:
        """Squares of `train/PART_grad_norm` and `train/update_PART` of the last step that was watched.

        A part's gradient norm is before clipping, and the root of all their squares is the whole; an update is a ratio
        of norms, |w' - w| / |w'|. Where no step was taken the denominators are 0.

        grad_norm  () of that step, over all ranks, before clipping
        """
        taken = grad_norm.isfinite()
        whole = sum(self._pulls.values(), self._zero)
        found: dict[str, Ratio] = {}
        for part in self._parts:
            # Under ZeRO gradients are clipped when they are seen here: their proportions are not.
            found[f"train/{part}_grad_norm"] = grad_norm.square() * self._pulls[part], torch.where(taken, whole, 0)
        for part in self._parts:
            found[f"train/update_{part}"] = self._moves[part], torch.where(taken, self._weights[part], 0)
        return found

    def _forget(self) -> None:
        self._zero = torch.zeros((), device=self._masters.tensors[0].device)
        self._pulls, self._moves, self._weights = (
            defaultdict[str, Tensor](lambda: self._zero) for _ in range(3)
        )  # squares, by part

    def _pulled(self, adam: torch.optim.Optimizer, *unused: Any) -> None:
        gradients = {i: m.grad for i, m in enumerate(self._masters.tensors) if self._watching and m.grad is not None}
        for _group, chunk in self._present(adam):
            gradient = torch.cat(laid_out(gradients, chunk.pieces))
            self._pulls[chunk.part] = self._pulls[chunk.part] + square_sum(gradient)

    def _moved(self, adam: torch.optim.Optimizer, *unused: Any) -> None:
        for group, chunk in self._present(adam):
            rate, decay, eps, (beta_1, beta_2) = (group[key] for key in ("lr", "weight_decay", "eps", "betas"))
            steps = adam.state[self._masters.tensors[chunk.pieces[0].master]]["step"].double()
            weights, first, second = (torch.cat(views) for views in chunk.views)
            root = second.sqrt_().div_((1 - beta_2**steps).sqrt())
            move = first.mul_(rate / (1 - beta_1**steps)).div_(root.add_(eps))
            move.add_(weights, alpha=rate * decay).div_(1 - rate * decay)
            self._moves[chunk.part] = self._moves[chunk.part] + square_sum(move)
            self._weights[chunk.part] = self._weights[chunk.part] + square_sum(weights)

    def _present(self, adam: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], _Chunk]]:
        """What this call of the optimizer moves, while it is watched; DeepSpeed calls it for one group at a time."""
        for group in adam.param_groups if self._watching else ():
            here = tuple(id(master) for master in group["params"] if master.grad is not None)
            if here not in self._chunks:
                self._chunks[here] = list(self._chunks_of(set(here)))
            for chunk in self._chunks[here]:
                yield group, chunk

    def _chunks_of(self, here: set[int]) -> Iterator[_Chunk]:
        """This rank's share of some masters; views of them are made once, since they stay where they are."""
        masters = self._masters.tensors
        lists = [masters, *map(self._masters.moments, MOMENTS)]
        for part, own in self._parts.items():
            for pieces in chunked([piece for piece in own if id(masters[piece.master]) in here], masters[0].device):
                yield _Chunk(part, pieces, [laid_out(tensors, pieces) for tensors in lists])
