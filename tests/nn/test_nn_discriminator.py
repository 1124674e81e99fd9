"""The PatchGAN discriminator: sizes of the reference (facts.md 2.1), names, initial weights, patches, norms."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ldm_scale.nn.discriminator import PatchDiscriminator, batch_norm, group_norm, smallest_side


@pytest.mark.parametrize(("layers", "parameters", "logits"), [(3, 2_765_633, 30), (2, 663_361, 62)])
def test_it_is_the_references(layers: int, parameters: int, logits: int) -> None:
    with torch.device("meta"):
        network = PatchDiscriminator(3, channels=64, layers=layers, norm=batch_norm)
        assert network(torch.empty(1, 3, 256, 256)).shape == (1, 1, logits, logits)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    names = [name for name, _ in network.named_parameters() if name.startswith(("main.2.", "main.3."))]
    assert names == ["main.2.weight", "main.3.weight", "main.3.bias"]  # a bias before a batch norm would do nothing
    assert network.state_dict().keys() == dict(network.named_parameters()).keys()


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(3, channels=32, layers=2, norm=batch_norm)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 10_000:
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.mean().item() == pytest.approx(1, abs=0.02)
            assert 0.01 < layer.weight.std().item() < 0.03 and not layer.bias.any()


@pytest.mark.parametrize(("layers", "side"), [(2, 34), (3, 70)])
def test_a_logit_sees_one_patch(layers: int, side: int) -> None:
    """Without norms, which see everything; the weights are made positive so that nothing cancels."""
    network = PatchDiscriminator(3, channels=8, layers=layers, norm=lambda width: nn.Identity())
    for parameter in network.parameters():
        parameter.data.abs_()
    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = network(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum((0, 1, 3)).nonzero()
    assert len(rows) == side


@pytest.mark.parametrize(("norm", "alike"), [(group_norm, True), (batch_norm, False)])
def test_only_group_norm_judges_each_image_by_itself(norm: Callable[[int], nn.Module], alike: bool) -> None:
    torch.manual_seed(0)
    network, images = PatchDiscriminator(3, channels=8, layers=2, norm=norm), torch.randn(4, 3, 16, 16)
    together, alone = network(images), torch.cat([network(image) for image in images.split(1)])
    assert torch.allclose(together, alone, atol=1e-5) == alike


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_smallest_image_has_a_logit_and_a_smaller_one_none(layers: int) -> None:
    network, side = PatchDiscriminator(3, channels=8, layers=layers, norm=group_norm), smallest_side(layers)
    assert network(torch.zeros(1, 3, side, side)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="Kernel size"):
        network(torch.zeros(1, 3, side - 2**layers, side - 2**layers))
