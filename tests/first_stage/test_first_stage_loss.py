"""The reconstruction loss against torch.distributions, hand arithmetic, and torchvision's VGG16."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg

from ldm_scale.first_stage.base import Codes, Moments, Rebuilt
from ldm_scale.first_stage.loss import (
    VGG16_FILE,
    AutoencoderLossConfig,
    BetaOn,
    FrozenDistance,
    PerceptualKind,
    RandomFeatureDistance,
    ReconstructionLoss,
    kl_divergence,
    load_vgg16,
    perceptual_network,
)


def test_kl_is_that_of_torch_distributions():
    mean, logvar = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    ours = kl_divergence(Moments(mean, logvar))
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    theirs = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(ours, theirs.flatten(1).sum(1))
    assert torch.equal(kl_divergence(Moments(torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2))), torch.zeros(2))
    assert torch.equal(kl_divergence(Moments(mean, None)), torch.zeros(4))


def test_total_is_the_reference_sum_over_pixels():
    """|x - x'| and the perceptual distance of the image are summed over C, H, W; kl_weight is relative to that."""
    config = AutoencoderLossConfig(pixel_weight=2.0, perceptual_weight=0.5, kl_weight=1e-2)
    loss = ReconstructionLoss(config, lambda a, b: torch.tensor([3.0, 5.0]))
    images = torch.randn(2, 3, 4, 6)
    reconstructions = torch.randn(2, 3, 4, 6)
    moments = Moments(torch.randn(2, 4, 1, 1), torch.randn(2, 4, 1, 1))
    terms = loss(images, Rebuilt(reconstructions, moments, None))
    errors = 2.0 * (images - reconstructions).abs() + 0.5 * torch.tensor([3.0, 5.0])[:, None, None, None]
    torch.testing.assert_close(terms.total, errors.sum((1, 2, 3)) + 1e-2 * kl_divergence(moments))
    torch.testing.assert_close(terms.l1, (images - reconstructions).abs().mean((1, 2, 3)))
    assert terms.perceptual.tolist() == [3.0, 5.0]
    torch.testing.assert_close(terms.kl, kl_divergence(moments))


@pytest.mark.parametrize("beta_on", BetaOn)
def test_codebook_terms_move_each_its_side_and_beta_weighs_the_one_it_is_on(beta_on: BetaOn):
    """By hand: the means over the values of an image and of a latent, as the reference's VQ loss reduces."""
    config = AutoencoderLossConfig(perceptual=PerceptualKind.none, codebook_weight=3.0, beta=0.5, beta_on=beta_on)
    latents = torch.tensor([[1.0, 2.0], [0.0, 4.0]]).view(2, 2, 1, 1).requires_grad_()
    entries = torch.tensor([[1.5, 0.0], [2.0, 3.0]]).view(2, 2, 1, 1).requires_grad_()
    codes = Codes(entries, torch.tensor([0, 1]).view(2, 1, 1), 2)
    images = torch.rand(2, 3, 4, 4)
    terms = ReconstructionLoss(config)(images, Rebuilt(images + 0.25, Moments(latents, None), codes))
    distances = torch.tensor([(0.25 + 4) / 2, (4 + 1) / 2])
    torch.testing.assert_close(terms.codebook, distances)
    torch.testing.assert_close(terms.commitment, distances)
    torch.testing.assert_close(terms.total, 0.25 + 3.0 * 1.5 * distances)
    assert terms.kl.tolist() == [0, 0]
    terms.total.sum().backward()
    of_latents, of_entries = (0.5, 1.0) if beta_on is BetaOn.commitment else (1.0, 0.5)
    apart = (latents - entries).detach()
    torch.testing.assert_close(latents.grad, 3.0 * of_latents * apart)
    torch.testing.assert_close(entries.grad, -3.0 * of_entries * apart)


def test_low_precision_reconstructions_are_compared_in_float32():
    loss = ReconstructionLoss(AutoencoderLossConfig(perceptual=PerceptualKind.none))
    images = torch.full((1, 3, 64, 64), 0.5)
    moments = Moments(torch.zeros(1, 1, 1, 1).bfloat16(), None)
    terms = loss(images, Rebuilt((images - 0.25).bfloat16(), moments, None))
    assert terms.total.dtype == torch.float32
    assert terms.total.item() == pytest.approx(0.25 * 3 * 64 * 64, rel=1e-6)
    assert terms.perceptual.item() == 0


def test_random_distance_is_a_distance_that_teaches_and_never_trains():
    network = perceptual_network(AutoencoderLossConfig(perceptual=PerceptualKind.random), None)
    assert network is not None
    a = torch.rand(3, 3, 32, 32) * 2 - 1
    b = (a + 0.2 * torch.randn_like(a)).requires_grad_()
    near, far = network(a, a + 0.01 * torch.randn_like(a)), network(a, b)
    assert far.shape == (3,)
    assert torch.equal(network(a, a), torch.zeros(3))
    assert (near < far).all()
    torch.testing.assert_close(network(b, a), far)
    far.sum().backward()
    assert b.grad is not None
    assert b.grad.abs().max() > 0
    assert not any(p.requires_grad for p in network.parameters())
    again = RandomFeatureDistance()
    torch.testing.assert_close(again(a, b), far)


def test_a_parents_train_does_not_wake_the_perceptual_network():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.dropout((a - b).square()).flatten(1).mean(1)

    parent = nn.Sequential(FrozenDistance(Noisy()))
    parent.train()
    a, b = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(parent[0](a, b), (a - b).square().flatten(1).mean(1))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight")
def test_lpips_gets_torchvisions_layers():
    """The features after relu1_2 ... relu5_3 are those of torchvision's network with the same weights."""
    import lpips

    torch.manual_seed(0)
    features = vgg.make_layers(vgg.cfgs["D"]).eval()
    network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    load_vgg16(network, {f"features.{name}": tensor for name, tensor in features.state_dict().items()})
    images = torch.rand(1, 3, 32, 32)
    expected = {}
    h = images
    for number, layer in enumerate(features):
        h = layer(h)
        expected[number] = h.clone()
    for number, ours in zip((3, 8, 15, 22, 29), network.net(images), strict=True):
        torch.testing.assert_close(ours, expected[number])


def test_absent_weights_name_the_remedy(tmp_path: Path):
    config = AutoencoderLossConfig()
    for weights, said in ((None, "paths.weights is not set"), (str(tmp_path), str(tmp_path / VGG16_FILE))):
        with pytest.raises(FileNotFoundError, match="make fetch-weights") as caught:
            perceptual_network(config, weights)
        assert said in str(caught.value)
    assert perceptual_network(AutoencoderLossConfig(perceptual=PerceptualKind.none), None) is None


def test_damaged_weights_are_not_loaded(tmp_path: Path):
    (tmp_path / VGG16_FILE).write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"damaged: its sha256 starts with .*, not 397923af"):
        perceptual_network(AutoencoderLossConfig(), str(tmp_path))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"beta": -1.0}, r"^autoencoder_loss\.beta=-1\.0"),
        ({"kl_weight": -1.0}, r"^autoencoder_loss\.kl_weight=-1\.0"),
        ({"pixel_weight": 0.0, "perceptual": PerceptualKind.none}, r"^autoencoder_loss\.pixel_weight=0 .*nothing"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        AutoencoderLossConfig(**changes)
