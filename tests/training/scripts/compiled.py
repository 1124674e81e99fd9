"""Trains two equal blocks, the second one recomputed: as they are, and compiled on several engines; rank 0 writes it.

usage  compiled.py OUT [KIND ...]
"""

import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from ldm_scale.core import runtime
from ldm_scale.nn.blocks import ResnetBlock
from ldm_scale.training.engine import EngineConfig, EngineKind, Precision
from ldm_scale.training.optimizer import OptimizerConfig


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResnetBlock(3, 3, groups=1, eps=1e-5) for _ in range(2))
        self.out = nn.Linear(48, 7)

    def forward(self, x_BCHW: Tensor, y_BK: Tensor) -> Tensor:
        """(B,) squared errors."""
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last).requires_grad_()  # as what a block gives
        h_BCHW = checkpoint(self.blocks[1], self.blocks[0](x_BCHW), use_reentrant=False)
        return (self.out(h_BCHW.flatten(1)).float() - y_BK).square().mean(1)


def trained(kind: str, compiles: bool, out: Path) -> dict[str, Any]:
    config = EngineConfig(kind=EngineKind(kind), precision=Precision.fp32, compile=compiles)
    engine = config.build(global_batch=tiny.GLOBAL_BATCH, micro_batch=tiny.MICRO_BATCH)
    torch.manual_seed(0)
    counters.clear()
    engine.prepare(Blocks(), OptimizerConfig())
    training = tiny.Training(engine, out / "unused")
    found: dict[str, Any] = {"losses": training.run(10), "graphs": counters["stats"]["unique_graphs"]}
    with torch.no_grad():
        engine.module(*tiny.samples(torch.arange(5)))  # another batch size
    found["graphs_without_gradients"] = counters["stats"]["unique_graphs"] - found["graphs"]
    found["names"] = list(engine.module.state_dict())
    engine.close()
    return found


def main() -> None:
    out, *kinds = sys.argv[1:]
    found = {"eager": trained("ddp", False, Path(out)), **{kind: trained(kind, True, Path(out)) for kind in kinds}}
    if runtime.is_main():
        Path(out, "compiled.json").write_text(json.dumps(found))
    runtime.leave()


main()
