"""U-Net and conditioner fit together or are refused; every kind of condition reaches the U-Net."""

from typing import Any

import pytest
import torch

from ldm_scale.conditioning.base import ConditionerConfig
from ldm_scale.conditioning.class_label import ClassLabelConfig, Gives
from ldm_scale.conditioning.layout import Layout, LayoutConfig, LayoutObject
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.diffusion.objective import ObjectiveConfig
from ldm_scale.diffusion.schedule import ScheduleConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.latent_diffusion.generate import Generator
from ldm_scale.latent_diffusion.model import DiffusionConfig, LatentDiffusion, LatentDiffusionConfig
from ldm_scale.nn.unet import UNetConfig
from ldm_scale.samplers.ddim import DDIMConfig

# conditioner, the U-Net's keys that fit it, two conditions, the name that `network` knows them by
CASES: dict[str, tuple[ConditionerConfig, dict[str, int], list[Any], str]] = {
    "class_token": (ClassLabelConfig(classes=4, width=16), {"context_dim": 16}, [0, 3], "context_BLD"),
    "class_vector": (ClassLabelConfig(classes=4, width=8, give=Gives.vector), {"vector_dim": 8}, [0, 3], "vector_BE"),
    "layout": (
        LayoutConfig(width=16, layers=1, heads=2, head_dim=8, max_objects=2, vocab_size=32),
        {"context_dim": 16},
        [Layout([LayoutObject(0, (0.0, 0.0, 0.5, 0.5))]), Layout([LayoutObject(3, (0.5, 0.5, 1.0, 1.0))])],
        "context_BLD",
    ),
    "image": (ConcatConfig(channels=3), {"in_channels": 7}, [torch.ones(3, 8, 8), -torch.ones(3, 8, 8)], "concat_BCHW"),
    "label_map": (
        LabelMapConfig(classes=4, channels=2, halvings=1),
        {"in_channels": 6},
        [torch.zeros(16, 16, dtype=torch.uint8), torch.ones(16, 16, dtype=torch.uint8)],
        "concat_BCHW",
    ),
}


def build(conditioning: ConditionerConfig | None, **unet: Any) -> LatentDiffusion:
    torch.manual_seed(0)
    shape = {
        "in_channels": 4, "out_channels": 4, "model_channels": 16, "channel_mult": [1], "attention_factors": [1],
        "head_channels": 8, "norm_groups": 8, "num_res_blocks": 1,
    }  # fmt: skip
    model = LatentDiffusionConfig(
        unet=UNetConfig(**(shape | unet)),
        conditioning=conditioning,
        diffusion=DiffusionConfig(schedule=ScheduleConfig(), objective=ObjectiveConfig()),
    ).build()
    for parameter in model.parameters():  # zero-initialised outputs would hide the condition
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_conditions_reach_the_unet(name: str):
    conditioning, unet, conditions, told = CASES[name]
    model = build(conditioning, **unet)
    assert model.conditioner is not None
    z, t = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1), torch.tensor([500, 500])
    inputs = model.conditioner.prepare(conditions)
    named = model.conditions(inputs)
    assert list(named) == [told]
    out = model.network(z, t, **named)
    assert (out[0] - out[1]).abs().max() > 1e-3
    null = model.network(z, t, **model.conditions(model.conditioner.null_inputs(2)))
    assert (null - out).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    dropped = model.conditions(model.conditioner.dropped(inputs, torch.tensor([True, True])))
    torch.testing.assert_close(model.network(z, t, **dropped), null)
    many_steps = model.sampling_conditions(inputs)
    assert ("keys_values_BF" in many_steps) == (told == "context_BLD")
    assert torch.equal(model.network(z, t, **many_steps), out)


@torch.no_grad()
def test_an_unconditional_model_is_told_nothing():
    model = build(None)
    assert model.conditions(None) == {}
    assert model(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0, 999]), None).shape == (2,)


@pytest.mark.parametrize(
    "conditioning, unet, message",
    [
        (CASES["class_token"][0], {"context_dim": 32}, r"^unet\.context_dim=32, but .* width 16: set it to 16"),
        (CASES["class_token"][0], {}, r"^unet\.context_dim=0, but .* width 16: set it to 16"),
        (None, {"context_dim": 16}, r"^unet\.context_dim=16, but .* width 0: set it to 0"),
        (
            CASES["image"][0],
            {},
            r"^unet\.in_channels=4, but .*out_channels=4 and the conditioner appends 3: set it to 7",
        ),
        (None, {"in_channels": 7}, r"^unet\.in_channels=7, but .* appends 0: set it to 4"),
        (CASES["class_vector"][0], {}, r"^unet\.vector_dim=0, but .* vector of width 8: set it to 8"),
        (None, {"vector_dim": 8}, r"^unet\.vector_dim=8, but .* width 0: set it to 0"),
    ],
    ids=["context", "no_context", "idle_context", "concat", "idle_concat", "vector", "idle_vector"],
)
def test_widths_that_do_not_fit_are_refused(conditioning: ConditionerConfig | None, unet: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        build(conditioning, **unet)


def images(model: LatentDiffusion, conditions: list[Any], guidance: float) -> torch.Tensor:
    torch.manual_seed(1)
    stage = AutoencoderKLConfig(channels=8, channel_mult=[1, 1], num_res_blocks=1, norm_groups=4).build()
    sampler = DDIMConfig(steps=2, guidance=guidance)
    generator = Generator(model=model, first_stage=stage, latent_scale=0.5, sampler=sampler, size=(16, 16), seed=7)
    return generator.images(conditions, [0, 0])


@pytest.mark.parametrize("name", CASES)
def test_guidance_works_with_every_kind_of_condition(name: str):
    conditioning, unet, conditions, _ = CASES[name]
    model = build(conditioning, **unet)
    plain, guided, without = (images(model, conditions, guidance) for guidance in (1.0, 3.0, 0.0))
    assert not torch.equal(plain, guided)
    assert not torch.equal(plain[0], plain[1])
    assert torch.equal(without[0], without[1])  # the same noise, and no condition


def test_a_model_without_a_null_class_draws_without_guidance_only():
    model = build(ClassLabelConfig(classes=4, width=16, null_class=False, dropout=0.0), context_dim=16)
    assert images(model, [0, 3], guidance=1.0).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="null_class"):
        images(model, [0, 3], guidance=2.0)


def parts_of(model: LatentDiffusion) -> dict[str, int]:
    """How many numbers each part has."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = model.part_of(name)
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def test_every_parameter_belongs_to_a_part():
    text = TextTransformerConfig(vocab_size=8, max_length=4, width=16, layers=1, heads=2, head_dim=8)
    model = build(text, context_dim=16)
    found = parts_of(model)
    assert set(found) == {"down", "mid", "up", "cross_attention", "ends", "text"}
    attentions = [module for name, module in model.named_modules() if name.endswith(".attn2")]
    assert found["cross_attention"] == sum(p.numel() for module in attentions for p in module.parameters()) > 0
    assert found["text"] == sum(p.numel() for p in model.conditioner.parameters())
    assert set(parts_of(build(None))) == {"down", "mid", "up", "ends"}
    labelled = build(ClassLabelConfig(classes=4, width=8, give=Gives.vector), vector_dim=8)
    assert set(parts_of(labelled)) == {"down", "mid", "up", "ends", "conditioner"}
