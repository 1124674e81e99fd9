"""A picture depends on its caption and its stream, not on the batch it is made in."""

import pytest
import torch

from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.diffusion.objective import ObjectiveConfig
from ldm_scale.diffusion.schedule import ScheduleConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.latent_diffusion.generate import Generator
from ldm_scale.latent_diffusion.model import DiffusionConfig, LatentDiffusionConfig
from ldm_scale.nn.unet import UNetConfig
from ldm_scale.samplers.ddim import DDIMConfig
from ldm_scale.training.validation import HeldOut

CAPTIONS = ["a red circle", "a blue square", "a green triangle at the top"]


def tiny(tokenizer: str, context_dim: int = 16) -> LatentDiffusionConfig:
    return LatentDiffusionConfig(
        unet=UNetConfig(
            in_channels=4, out_channels=4, model_channels=16, channel_mult=[1], attention_factors=[1], head_channels=8,
            context_dim=context_dim, norm_groups=8, num_res_blocks=1,
        ),
        conditioning=TextTransformerConfig(
            width=16, layers=1, heads=2, head_dim=8, max_length=8, vocab_size=64, tokenizer=tokenizer
        ),
        diffusion=DiffusionConfig(schedule=ScheduleConfig(), objective=ObjectiveConfig()),
    )  # fmt: skip


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    train_wordpiece(CAPTIONS, 64, path)
    torch.manual_seed(0)
    model = tiny(str(path)).build()
    for parameter in model.parameters():  # zero-initialised outputs would hide the caption
        torch.nn.init.normal_(parameter, std=0.2)
    stage = AutoencoderKLConfig(channels=8, channel_mult=[1, 1], num_res_blocks=1, norm_groups=4).build()
    sampler = DDIMConfig(steps=3, eta=1.0, guidance=2.0)
    return Generator(model=model, first_stage=stage, latent_scale=0.5, sampler=sampler, size=(16, 16), seed=7)


def test_an_image_is_the_same_in_any_batch(generator: Generator) -> None:
    together = generator.images(CAPTIONS, [0, 1, 2])
    alone = torch.cat([generator.images([caption], [i]) for i, caption in enumerate(CAPTIONS)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    by_twos = torch.cat(list(generator.batches(CAPTIONS, 2)))
    torch.testing.assert_close(together, by_twos, rtol=0, atol=1e-4)
    assert together.shape == (3, 3, 16, 16)
    assert together.abs().max() <= 1


def test_stream_and_caption_both_matter(generator: Generator) -> None:
    image = generator.images(CAPTIONS[:1], [0])
    assert not torch.equal(image, generator.images(CAPTIONS[:1], [1]))
    assert not torch.equal(image, generator.images(CAPTIONS[1:2], [0]))


def test_unequal_context_widths_are_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="context_dim=32"):
        tiny("unused.json", context_dim=32).build()


def test_the_loss_is_that_of_the_noise(generator: Generator) -> None:
    """With a network that answers zero, the eps loss of each sample is the mean square of its noise."""
    model = generator.model
    kept = {name: p.detach().clone() for name, p in model.unet.conv_out.named_parameters()}
    with torch.no_grad():
        for parameter in model.unet.conv_out.parameters():
            parameter.zero_()
        z, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
        loss_B = model(z, noise, t, model.conditioner.prepare(CAPTIONS))
        model.unet.conv_out.load_state_dict(kept)
    torch.testing.assert_close(loss_B, noise.square().flatten(1).mean(1))


def test_validation_loss_is_fixed_and_names_its_buckets(generator: Generator) -> None:
    model = generator.model
    held_out = HeldOut(torch.randn(3, 4, 8, 8), model.conditioner.prepare(CAPTIONS), seed=0, batch=2)
    losses = held_out.loss(model)
    assert sorted(losses) == ["val/caption_gap", "val/loss", *(f"val/loss_t{bucket}00" for bucket in range(10))]
    assert losses["val/loss"] == pytest.approx(sum(losses[f"val/loss_t{b}00"] for b in range(10)) / 10)
    whole = HeldOut(held_out.z_0_NCHW, held_out.inputs, seed=0, batch=3).loss(model)
    assert whole["val/loss"] == pytest.approx(losses["val/loss"], rel=1e-5)


def test_the_caption_gap_is_what_true_captions_are_worth(generator: Generator) -> None:
    model, z_0_NCHW = generator.model, torch.randn(3, 4, 8, 8)
    told = model.conditioner.prepare(CAPTIONS)
    losses = HeldOut(z_0_NCHW, told, seed=0, batch=2).loss(model)
    others = HeldOut(z_0_NCHW, told[[2, 0, 1]], seed=0, batch=2).loss(model, suffix="_raw")
    assert losses["val/caption_gap"] == pytest.approx(others["val/loss_raw"] - losses["val/loss"], rel=1e-6)
    assert losses["val/caption_gap"] != 0 and "val/caption_gap" not in others
    alike = HeldOut(z_0_NCHW, told[[0, 0, 0]], seed=0, batch=2).loss(model)
    assert alike["val/caption_gap"] == 0
