"""An original checkpoint through our loader and our export to diffusers: three implementations draw one picture."""

from pathlib import Path
from typing import Any

import compvis_configs
import diffusers
import torch
from torch import Tensor

from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.interop import compvis
from ldm_scale.interop import diffusers as interop
from ldm_scale.interop.bundle import Bundle
from ldm_scale.samplers import ddim
from ldm_scale.samplers.base import guided_denoiser

CAPTIONS = ["a red circle", "two blue squares"]
STEPS, GUIDANCE = 10, 3.0
SIDE = 8  # of the latents


def drawn(bundle: Bundle, network: Any, decode: Any, z_T: Tensor, told: list[dict[str, Tensor]]) -> Tensor:
    """Images of our DDIM in [-1, 1], with a U-Net and a decoder of either kind."""
    assert bundle.schedule is not None and bundle.diffusion is not None
    objective = bundle.diffusion.objective.build()
    scale = GUIDANCE if told[0] else 1.0
    denoise = guided_denoiser(network, bundle.schedule, objective, told[0], told[1], scale)
    z_0 = ddim.sample(denoise, z_T, bundle.schedule.timesteps(STEPS), bundle.schedule)
    return decode(z_0 / bundle.latent_scale).clamp(-1, 1)


def pictures(images: Any) -> Tensor:
    """What a pipeline gives, (B, H, W, 3) in [0, 1], as (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2) * 2 - 1


def assert_one_picture(ours: Tensor, *others: Tensor) -> None:
    assert ours.std() > 0.05 and (ours.abs() < 0.99).float().mean() > 0.3  # neither flat nor all black and white
    for other in others:
        assert (ours - other).abs().max() <= 1e-4


@torch.no_grad()
def test_text_to_image(tmp_path: Path, original: Any):
    train_wordpiece(CAPTIONS, 60, tmp_path / "words.json")
    shape = {"cond_stage_config__vocab_size": 60, "cond_stage_config__max_seq_len": 77}
    made = original(compvis_configs.small("txt2img", **shape))
    bundle = compvis.load(made.config, made.checkpoint)
    bundle.conditioner.config.tokenizer = str(tmp_path / "words.json")
    assert interop.export(bundle, tmp_path / "out", size=2 * SIDE) == "LDMTextToImagePipeline"
    pipeline = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)

    z_T = torch.randn(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(CAPTIONS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=z_T, output_type="np")
    model = bundle.latent_diffusion()
    ids = [bundle.conditioner.prepare(CAPTIONS), bundle.conditioner.null_inputs(2)]
    ours = drawn(bundle, model.network, bundle.first_stage.decode, z_T, [model.conditions(i) for i in ids])
    originals = drawn(
        bundle,
        lambda z, t, context_BLD: made.model.unet(z, t, context_BLD),
        made.model.first_stage_model.decode,
        z_T,
        [{"context_BLD": made.model.cond_stage_model(i)} for i in ids],
    )
    assert_one_picture(ours, originals, pictures(theirs.images))


@torch.no_grad()
def test_unconditional(tmp_path: Path, original: Any):
    made = original("celeba", averaged=True)
    bundle = compvis.load(made.config, made.checkpoint, raw=True)
    assert interop.export(bundle, tmp_path / "out", size=2 * SIDE) == "LDMPipeline"
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)

    theirs = pipeline(
        batch_size=2, generator=torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np"
    )
    z_T = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    ours = drawn(bundle, bundle.unet, bundle.first_stage.decode, z_T, [{}, {}])
    originals = drawn(bundle, made.model.unet, made.model.first_stage_model.decode, z_T, [{}, {}])
    assert_one_picture(ours, originals, pictures(theirs.images))
