"""What a first stage minimises: absolute error, an optional perceptual distance, and KL divergence or codebook terms.

The adversarial term stands in `adversarial.py`.

Rombach et al. 2022, appendix G; reductions as in the reference (facts.md W6): sums over the values of an image for a
KL first stage, means for a VQ one. The perceptual network is passed in;
`perceptual_network` makes one. Knows nothing of optimizers, files of images or ranks.

Shape letters: B batch, C channels, H W height and width.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldm_scale.core.storage import sha256_file
from ldm_scale.first_stage.adversarial import AdversarialConfig
from ldm_scale.first_stage.base import Moments, Rebuilt

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""(images, images), both (B, C, H, W) in [-1, 1] -> distances (B,)."""

VGG16_FILE = "vgg16-397923af.pth"
"""torchvision's ImageNet weights; the name ends in the first digits of the file's sha256."""


class PerceptualKind(Enum):
    """Which perceptual distance is added to the absolute error."""

    none = "none"
    lpips = "lpips"
    """Zhang et al. 2018, VGG16; needs weights."""
    random = "random"
    """The same arithmetic in a small network with fixed random weights: for toys and tests, no weights needed."""


class BetaOn(Enum):
    """Which of the two codebook terms `beta` multiplies; the other has weight 1."""

    commitment = "commitment"
    """The one that moves the encoder, as published (van den Oord et al. 2017, eq. 3)."""
    codebook = "codebook"
    """The one that moves the codebook, as the released VQ models were trained (facts.md W1)."""


@dataclass(kw_only=True, slots=True)
class AutoencoderLossConfig:
    """Weights of the terms; the defaults are those of Rombach et al. 2022."""

    pixel_weight: float = 1.0
    """Weight of the absolute error of a value, in a sum over an image (KL) or a mean (VQ)."""
    perceptual: PerceptualKind = PerceptualKind.lpips
    """Which perceptual distance is added."""
    perceptual_weight: float = 1.0
    """Weight of the perceptual distance against the absolute error of one pixel channel."""
    kl_weight: float = 1e-6
    """Weight of KL(q(z|x) || N(0, I)) in nats against the absolute error summed over an image."""
    codebook_weight: float = 1.0
    """Weight of both codebook terms against the absolute error of one pixel channel."""
    beta: float = 0.25
    """Weight of one codebook term against the other."""
    beta_on: BetaOn = BetaOn.commitment
    """Which of them it multiplies."""
    codebook_window: int = 10_000
    """Images over which it is counted which entries of a codebook are taken: train/codebook_usage."""
    restart_codes: bool = False
    """Entries that no latent took in a window start again at latents drawn from the batch that ends it."""
    learn_variance: bool = False
    """Learn one variance of all errors, each of which counts as e / exp(s) + s, s from 0 on; no optimizer of the
    reference's moves its s."""
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    """The discriminator, and its share in the loss."""

    def __post_init__(self) -> None:
        for name, value in (
            ("pixel_weight", self.pixel_weight),
            ("perceptual_weight", self.perceptual_weight),
            ("kl_weight", self.kl_weight),
            ("codebook_weight", self.codebook_weight),
            ("beta", self.beta),
        ):
            if value < 0:
                raise ValueError(f"autoencoder_loss.{name}={value}; must be at least 0")
        if self.codebook_window < 1:
            raise ValueError(f"autoencoder_loss.codebook_window={self.codebook_window}; at least 1 image")
        if self.pixel_weight == 0 and (self.perceptual is PerceptualKind.none or self.perceptual_weight == 0):
            raise ValueError(
                "autoencoder_loss.pixel_weight=0 and no perceptual distance: nothing would be reconstructed"
            )


@dataclass(frozen=True, slots=True)
class ReconstructionTerms:
    """The loss of each sample and what it is made of; every field is (B,), float32.

    total       what is minimised, averaged over the batch. With a KL term a sum over the C * H * W values of an image,
                so it grows with the image (kl_weight is relative to that sum); with codebook terms their mean
    nll         what the reconstruction has in it
    l1          absolute error, mean over C, H, W
    perceptual  perceptual distance of the image; zero where there is none
    kl          KL divergence in nats, summed over the latent; zero where the latent is certain
    codebook    squared distance of latents to their entries, mean over the latent, whose gradient moves the entries;
                zero where there is no codebook
    commitment  the same number, whose gradient moves the latents
    """

    total: Tensor
    nll: Tensor
    l1: Tensor
    perceptual: Tensor
    kl: Tensor
    codebook: Tensor
    commitment: Tensor


class ReconstructionLoss:
    """The error of a value of an image is e = pixel_weight |x - x'| + perceptual_weight p(x, x'); for each sample:

    KL first stages  sum over C, H, W of e + kl_weight KL
    VQ first stages  mean over C, H, W of e + codebook_weight (codebook + beta commitment)

    As in the reference, the one perceptual distance of an image is added to each of its C * H * W errors.
    """

    def __init__(self, config: AutoencoderLossConfig, perceptual: Perceptual | None = None) -> None:
        """`perceptual` comes from `perceptual_network(config, ...)`, None exactly where config.perceptual is none."""
        assert (perceptual is None) == (config.perceptual is PerceptualKind.none)
        self.config = config
        self.perceptual = perceptual
        self.variance = LearntVariance() if config.learn_variance else None
        """To be trained with the first stage; None where every error counts as it is."""

    def __call__(self, images_BCHW: Tensor, rebuilt: Rebuilt) -> ReconstructionTerms:
        """Compared in float32; pixels in [-1, 1]."""
        images_BCHW, reconstructions_BCHW = images_BCHW.float(), rebuilt.images.float()
        l1_B = (images_BCHW - reconstructions_BCHW).abs().flatten(1).mean(1)
        kl_B, (codebook_B, commitment_B) = kl_divergence(rebuilt.moments), codebook_terms(rebuilt)
        if self.perceptual is None:
            perceptual_B = torch.zeros_like(l1_B)
        else:
            perceptual_B = self.perceptual(images_BCHW, reconstructions_BCHW)
        per_value_B = self.config.pixel_weight * l1_B + self.config.perceptual_weight * perceptual_B
        if self.variance is not None:
            per_value_B = self.variance(per_value_B)
        if rebuilt.codes is None:
            nll_B, regular_B = per_value_B * images_BCHW[0].numel(), self.config.kl_weight * kl_B
        else:
            nll_B, regular_B = per_value_B, self.config.codebook_weight * self._weighted(codebook_B, commitment_B)
        return ReconstructionTerms(nll_B + regular_B, nll_B, l1_B, perceptual_B, kl_B, codebook_B, commitment_B)

    def _weighted(self, codebook_B: Tensor, commitment_B: Tensor) -> Tensor:
        if self.config.beta_on is BetaOn.commitment:
            return codebook_B + self.config.beta * commitment_B
        return self.config.beta * codebook_B + commitment_B


class LearntVariance(nn.Module):
    """Errors in units of a spread s that is learnt, and its cost: the negative log-likelihood but for constants."""

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(1))

    def forward(self, errors_B: Tensor) -> Tensor:
        """errors / exp(s) + s, (B,); smallest where exp(s) is their mean."""
        nll_B: Tensor = errors_B / self.logvar.exp() + self.logvar
        return nll_B


def kl_divergence(moments: Moments) -> Tensor:
    """KL(N(mean, var) || N(0, I)) = sum over C, H, W of (mean^2 + var - 1 - log var) / 2, in nats; (B,), float32."""
    if moments.logvar is None:
        return torch.zeros(len(moments.mean), device=moments.mean.device)
    mean, logvar = moments.mean.float(), moments.logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def codebook_terms(rebuilt: Rebuilt) -> tuple[Tensor, Tensor]:
    """Mean over C, H, W of |sg(z) - e|^2 and of |z - sg(e)|^2 (van den Oord et al. 2017, eq. 3), (B,) float32 each.

    Zeros where there is no codebook.
    """
    latents_BCHW = rebuilt.moments.mean.float()
    if rebuilt.codes is None:
        none = latents_BCHW.new_zeros(len(latents_BCHW))
        return none, none
    entries_BCHW = rebuilt.codes.quantised.float()
    codebook_BCHW = (latents_BCHW.detach() - entries_BCHW).square()
    commitment_BCHW = (latents_BCHW - entries_BCHW.detach()).square()
    return codebook_BCHW.flatten(1).mean(1), commitment_BCHW.flatten(1).mean(1)


def perceptual_network(config: AutoencoderLossConfig, weights: str | None) -> "FrozenDistance | None":
    """The distance that `config` asks for, frozen, on the CPU; None for none.

    weights  directory that holds VGG16_FILE; only LPIPS needs it
    raises   FileNotFoundError where LPIPS is asked for and the file is not there; ValueError where it is damaged
    """
    if config.perceptual is not PerceptualKind.lpips:
        return perceptual_architecture(config)
    vgg16 = torch.load(vgg16_file(weights), weights_only=True, map_location="cpu")
    distance = perceptual_architecture(config)
    assert distance is not None
    load_vgg16(distance.network, vgg16)
    return distance


def perceptual_architecture(config: AutoencoderLossConfig) -> "FrozenDistance | None":
    """`perceptual_network` without VGG16's weights: enough to count what it costs."""
    if config.perceptual is PerceptualKind.none:
        return None
    if config.perceptual is PerceptualKind.random:
        return FrozenDistance(RandomFeatureDistance())
    import lpips  # over a second to import

    return FrozenDistance(lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False))  # linear weights ship with it


class FrozenDistance(nn.Module):
    """A perceptual network that does not train: no gradients to its weights, and evaluation mode always.

    A parent's train() does not reach the dropout inside (facts.md W5). Keep it out of modules whose weights are saved.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenDistance":
        """Stays in evaluation mode, whatever `mode`."""
        super().train(False)
        return self

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distances (B,) between images in [-1, 1]; differentiable in both."""
        distances_B: Tensor = self.network(a_BCHW, b_BCHW).flatten()
        return distances_B


class RandomFeatureDistance(nn.Module):
    """LPIPS's arithmetic (Zhang et al. 2018, eq. 1, equal channel weights) on features of a fixed random network."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.layers = nn.ModuleList(nn.Conv2d(i, o, kernel_size=3, stride=2, padding=1) for i, o in pairwise(widths))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """(B,) sum over layers of the squared distance of channel-normalised features, averaged over pixels."""
        distances_B = torch.zeros(len(a_BCHW), device=a_BCHW.device)
        for layer in self.layers:
            a_BCHW, b_BCHW = functional.relu(layer(a_BCHW)), functional.relu(layer(b_BCHW))
            difference = functional.normalize(a_BCHW, dim=1) - functional.normalize(b_BCHW, dim=1)
            distances_B = distances_B + difference.square().sum(1).flatten(1).mean(1)
        return distances_B


def vgg16_file(weights: str | None) -> str:
    """The path of VGG16_FILE in the directory `weights`, proven whole.

    raises  FileNotFoundError where it is not there, ValueError where it is damaged
    """
    remedy = (
        "run `make fetch-weights` (on a machine with internet) and point paths.weights at it, or do without VGG-16: "
        "autoencoder_loss.perceptual=none or random, evaluation.features=random"
    )
    if weights is None:
        raise FileNotFoundError(f"VGG-16 is asked for ({VGG16_FILE}), and paths.weights is not set; {remedy}")
    path = os.path.join(weights, VGG16_FILE)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"VGG-16 is asked for, and {path} is not there; {remedy}")
    expected = VGG16_FILE.removesuffix(".pth").rpartition("-")[2]
    if not (found := sha256_file(path)).startswith(expected):
        raise ValueError(
            f"{path} is damaged: its sha256 starts with {found[:8]}, not {expected}; delete it and {remedy}"
        )
    return path


def load_vgg16(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Put torchvision's VGG16 weights (`features.N.weight`) into LPIPS, which keeps layer N as `net.sliceS.N`."""
    for name, parameter in network.named_parameters():
        if name.startswith("net.slice"):
            layer, kind = name.split(".")[2:]
            with torch.no_grad():
                parameter.copy_(state[f"features.{layer}.{kind}"])
