"""Fresh weights are distributed as the reference's, kind of layer by kind of layer."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_scale.nn.autoencoder import Decoder, Encoder
from ldm_scale.nn.transformer import TextTransformer
from ldm_scale.nn.unet import UNetConfig

UNET: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
    "attention_factors": [2], "num_heads": 4, "norm_groups": 16,
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {"widths": [16, 32], "num_res_blocks": 1, "attention_factors": [2], "groups": 8}
TEXT: dict[str, Any] = {"vocab_size": 600, "max_length": 77, "width": 64, "layers": 2, "heads": 4, "head_dim": 8}

# Names' ends of the layers that start at zero: the last of every residual branch of the U-Net, and its output.
ZERO = {
    "unet_with_context": ("conv2", "proj_out", "conv_out"),
    "unet_plain_residual": ("conv2", "to_out.0", "conv_out"),
    "encoder": (),
    "decoder": (),
    "text_transformer": (),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "unet_with_context":
        return UNetConfig(**UNET, context_dim=24, vector_dim=6).build()
    if name == "unet_plain_residual":
        return UNetConfig(**UNET, residual_resampling=True, scale_shift_norm=True).build()
    if name == "encoder":
        return Encoder(3, 6, **AUTOENCODER)
    if name == "decoder":
        return Decoder(3, 3, **AUTOENCODER)
    return TextTransformer(**TEXT, embedding_std=0.02)


def products(network: nn.Module, zero: tuple[str, ...], *, starting_at_zero: bool) -> Iterator[tuple[str, nn.Module]]:
    """Convolutions and linear layers that start at zero, or those that do not."""
    for path, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and path.endswith(zero) == starting_at_zero:
            yield path, module


def assert_uniform(path: str, values: Tensor, bound: float) -> None:
    """All of -bound ... bound, evenly: its edge is nearly reached, never passed, and the variance is bound^2 / 3."""
    assert values.abs().max() <= bound, path
    n = values.numel()
    tolerance = 4 * math.sqrt(0.8 / n)  # four standard errors of the mean square of n even draws
    assert values.square().mean().item() == pytest.approx(bound**2 / 3, rel=tolerance), path


@pytest.mark.parametrize("name", ZERO)
def test_convolutions_and_linear_layers_start_as_torch_has_it_or_at_zero(name: str):
    network = build(name)
    for path, module in products(network, ZERO[name], starting_at_zero=False):
        bound = 1 / math.sqrt(module.weight[0].numel())
        assert_uniform(path, module.weight, bound)
        if module.bias is not None and module.bias.numel() > 50:
            assert_uniform(path, module.bias, bound)
    ends = set()
    for path, module in products(network, ZERO[name], starting_at_zero=True):
        assert not any(parameter.any() for parameter in module.parameters()), path
        ends |= {end for end in ZERO[name] if path.endswith(end)}
    assert ends == set(ZERO[name])


@pytest.mark.parametrize("name", ZERO)
def test_norms_start_as_the_identity(name: str):
    norms = [module for module in build(name).modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]
    assert len(norms) >= 4
    assert all((norm.weight == 1).all() and (norm.bias == 0).all() for norm in norms)


@pytest.mark.parametrize("std", [0.02, 0.5])
def test_text_embeddings_start_normal(std: float):
    torch.manual_seed(0)
    model = TextTransformer(**TEXT, embedding_std=std).model
    for weight in (model.embed_tokens.weight, model.embed_positions.weight):
        error = 4 / math.sqrt(2 * weight.numel())  # four standard errors of a standard deviation
        assert weight.std().item() == pytest.approx(std, rel=error)
        assert weight.mean().item() == pytest.approx(0, abs=4 * std / math.sqrt(weight.numel()))
        assert (weight.abs() < std).float().mean().item() == pytest.approx(0.6827, abs=0.03)  # normal, not uniform


@pytest.mark.parametrize("name", ZERO)
def test_every_parameter_is_of_a_kind_that_is_tested(name: str):
    known = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)
    network = build(name)
    covered = sum(p.numel() for m in network.modules() if isinstance(m, known) for p in m.parameters(recurse=False))
    assert covered == sum(parameter.numel() for parameter in network.parameters())
