"""Compilation block by block: what is compiled once serves every block of the same shape.

A whole U-Net would take minutes to compile. Its blocks repeat, and activation checkpointing and engines still see them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm_scale.nn.attention import AttentionBlock, SpatialTransformer
from ldm_scale.nn.blocks import ResnetBlock
from ldm_scale.nn.transformer import TextLayer

_BLOCKS = (ResnetBlock, AttentionBlock, SpatialTransformer, TextLayer)


def compile_blocks(network: nn.Module) -> int:
    """Have every block compiled at its first forward pass with gradients; returns how many blocks there are.

    Names, parameters and buffers stay as they are. Without gradients blocks run as before: what is drawn and scored
    comes in other batch sizes, each of which would be compiled anew.
    """
    blocks = [module for module in network.modules() if isinstance(module, _BLOCKS)]
    for block in blocks:
        block.forward = _compiled(block.forward)  # type: ignore[method-assign]
    # Past its limit of shapes for one function, 8, torch would go back to what is not compiled.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(blocks))
    return len(blocks)


def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    compiled = torch.compile(forward, fullgraph=True, dynamic=False)

    def chosen(*args: Any) -> Tensor:
        out: Tensor = (compiled if torch.is_grad_enabled() else forward)(*args)
        return out

    return chosen
