from collections.abc import Callable

import pytest
import torch
from torch import nn

Randomise = Callable[[nn.Module, int], nn.Module]


@pytest.fixture
def randomise() -> Randomise:
    """Move every parameter away from its start: zero-initialised branches switch on, norms stop being trivial."""

    def move(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 25
                parameter += torch.randn(parameter.shape, generator=generator) / fan**0.5
        return module.eval()

    return move
