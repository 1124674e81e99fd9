"""The first stage that does nothing."""

import pytest
import torch

from ldm_scale.first_stage.base import MomentsKind
from ldm_scale.first_stage.identity import IdentityConfig


def test_latents_are_the_pixels():
    stage, images = IdentityConfig().build(), torch.rand(2, 3, 5, 7)
    moments = stage.encode(images)
    assert moments.kind is MomentsKind.POINT
    assert torch.equal(moments.mean, images)
    assert torch.equal(stage.decode(images), images)
    rebuilt = stage(images, torch.randn(2, 3, 5, 7))
    assert torch.equal(rebuilt.images, images)
    assert torch.equal(rebuilt.moments.mean, images)
    assert rebuilt.codes is None


def test_it_has_no_weights_and_a_digest():
    stage = IdentityConfig(image_channels=1).build()
    assert stage.state_dict() == {}
    assert stage.config.latent_shape(9) == (1, 9, 9)
    assert stage.digest() == IdentityConfig().build().digest()


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match=r"^first_stage\.image_channels=0; must be at least 1"):
        IdentityConfig(image_channels=0)
