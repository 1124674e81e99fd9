"""Adversarial terms by hand arithmetic, each alone; what the configuration refuses."""

import math
from typing import Any

import pytest
import torch

from ldm_scale.first_stage.adversarial import (
    AdversarialConfig,
    AdversarialKind,
    DiscriminatorNorm,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from ldm_scale.first_stage.base import Moments, Rebuilt
from ldm_scale.first_stage.loss import AutoencoderLossConfig, PerceptualKind, ReconstructionLoss

ORIGINALS = torch.tensor([[[[2.0, 0.5]]], [[[-1.0, 1.0]]]])
REBUILT = torch.tensor([[[[-3.0, 0.0]]], [[[0.5, -1.0]]]])


def test_generator_raises_the_mean_logit() -> None:
    assert generator_loss(REBUILT).tolist() == [1.5, 0.25]


def test_hinge_by_hand() -> None:
    """Originals cost max(0, 1 - logit): 0, 0.5 | 2, 0; reconstructions max(0, 1 + logit): 0, 1 | 1.5, 0."""
    found = discriminator_loss(AdversarialKind.hinge, ORIGINALS, REBUILT)
    assert found.tolist() == [0.5 * (0.25 + 0.5), 0.5 * (1.0 + 0.75)]


def test_vanilla_by_hand() -> None:
    found = discriminator_loss(AdversarialKind.vanilla, ORIGINALS, REBUILT)
    by_hand = [
        0.25 * sum(math.log1p(math.exp(x)) for x in (-2.0, -0.5, -3.0, 0.0)),
        0.25 * sum(math.log1p(math.exp(x)) for x in (1.0, -1.0, 0.5, -1.0)),
    ]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-6)


def test_adaptive_weight_is_a_ratio_of_norms_up_to_its_limit() -> None:
    three, four = torch.full((1, 9), 1.0), torch.full((16,), 1.0)
    assert adaptive_weight(three, four).item() == pytest.approx(3 / (4 + 1e-4))
    assert adaptive_weight(three, torch.zeros(16)).item() == pytest.approx(1e4)
    assert adaptive_weight(three.bfloat16(), four.bfloat16()).dtype is torch.float32


def test_a_learnt_variance_is_that_of_the_errors_where_the_loss_is_smallest() -> None:
    loss = ReconstructionLoss(AutoencoderLossConfig(perceptual=PerceptualKind.none, learn_variance=True))
    assert loss.variance is not None
    images = torch.zeros(2, 3, 4, 4)
    rebuilt = Rebuilt(torch.full_like(images, 0.25), Moments(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)), None)
    terms = loss(images, rebuilt)
    assert terms.nll.tolist() == terms.total.tolist() == [0.25 * 48] * 2  # s = 0: as if there were none
    with torch.no_grad():
        loss.variance.logvar.fill_(math.log(0.25))
    terms = loss(images, rebuilt)
    assert terms.nll.tolist() == pytest.approx([48 * (1 + math.log(0.25))] * 2)
    terms.total.mean().backward()
    assert loss.variance.logvar.grad is not None and loss.variance.logvar.grad.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weight": -1.0}, r"autoencoder_loss\.adversarial\.weight=-1"),
        ({"weight": math.inf}, r"adversarial\.weight=inf"),
        ({"start_images": -1}, r"adversarial\.start_images=-1"),
        ({"layers": 0}, r"adversarial\.layers=0; must be at least 1"),
        ({"learning_rate_ratio": 0.0}, r"learning_rate_ratio=0\.0; above 0"),
        (
            {"channels": 12, "norm": DiscriminatorNorm.group},
            r"channels=12 with norm=group.*multiple of 8, or norm=batch",
        ),
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AdversarialConfig(**wrong)


def test_images_without_a_logit_are_refused_where_there_is_a_discriminator() -> None:
    AdversarialConfig(layers=2).require_fits(12)
    AdversarialConfig(layers=3, kind=AdversarialKind.none).require_fits(8)
    with pytest.raises(ValueError, match=r"layers=3 judges images of 24 pixels a side or more, these have 20"):
        AdversarialConfig(layers=3).require_fits(20)
