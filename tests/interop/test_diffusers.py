"""Export and import, with diffusers itself as the oracle: its loaders, its pipelines, its save_pretrained."""

import dataclasses
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.conditioning.tokenizer import train_wordpiece
from ldm_scale.diffusion.objective import ObjectiveConfig, Prediction
from ldm_scale.diffusion.schedule import End, ScheduleConfig, ScheduleKind
from ldm_scale.first_stage.base import FirstStageConfig
from ldm_scale.first_stage.identity import IdentityConfig
from ldm_scale.first_stage.kl import AutoencoderKLConfig
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.interop import bundle as bundles
from ldm_scale.interop import diffusers as interop
from ldm_scale.interop import diffusers_config as words
from ldm_scale.interop.bundle import Bundle
from ldm_scale.jobs import config as jobs_config
from ldm_scale.latent_diffusion.model import DiffusionConfig
from ldm_scale.nn.unet import UNetConfig
from ldm_scale.samplers import ddim
from ldm_scale.samplers.base import guided_denoiser

CAPTIONS = ["a red circle", "two blue squares and a star"]
STEPS = 10
DIFFUSION = DiffusionConfig(schedule=ScheduleConfig(), objective=ObjectiveConfig())

TOY = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_factors": [2],
    "num_heads": 2,
    "norm_groups": 8,
}
UNETS: dict[str, dict[str, Any]] = {
    "text": {"context_dim": 12},
    "width of heads": {"context_dim": 12, "num_heads": 0, "head_channels": 8, "attention_factors": [1, 2]},
    "depth, three levels": {"context_dim": 12, "transformer_depth": 2, "channel_mult": [1, 2, 2], "num_res_blocks": 2},
    "vector, concat, scale and shift": {"context_dim": 12, "vector_dim": 6, "in_channels": 7, "scale_shift_norm": True},
    "unconditional": {"num_heads": 0, "head_channels": 8, "channel_mult": [1, 2, 3], "attention_factors": [2, 4]},
    "unconditional, one head": {"num_heads": 1, "attention_factors": [1, 2]},
    "unconditional, residual": {"residual_resampling": True, "scale_shift_norm": True},
    "unconditional, middle only": {"num_heads": 4, "attention_factors": []},
}
CODEC: dict[str, Any] = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4, "scale": 0.7}
FIRST_STAGES: dict[str, FirstStageConfig] = {
    "kl": AutoencoderKLConfig(**CODEC),
    "kl, attention": AutoencoderKLConfig(**CODEC | {"attention_factors": [2]}),
    "kl, no middle attention": AutoencoderKLConfig(**CODEC, mid_attention=False),
    "vq": AutoencoderVQConfig(**CODEC, codebook_size=32),
    "vq, wider latent": AutoencoderVQConfig(**CODEC, codebook_size=32, z_channels=6, attention_factors=[1]),
}
Randomise = Callable[..., Any]


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """Every parameter moved away from its start, so that zero-initialised branches count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 25
            parameter += 0.7 * torch.randn(parameter.shape, generator=generator) / fan**0.5
    return module.eval()


def network(config: UNetConfig) -> dict[str, Any]:
    """What a configuration builds: heads may be said by number or by width."""
    fields = dataclasses.asdict(config)
    number, width = fields.pop("num_heads"), fields.pop("head_channels")
    attended = [w for level, w in enumerate(config.widths) if 2**level in config.attention_factors] + config.widths[-1:]
    return {**fields, "heads": [number or w // width for w in attended]}


def assert_equal_weights(ours: nn.Module, theirs: nn.Module) -> None:
    state, other = ours.state_dict(), theirs.state_dict()
    assert state.keys() == other.keys() and len(state) > 10
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def assert_same_output(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def text_bundle(tmp_path: Path, **objective: Any) -> Bundle:
    train_wordpiece(CAPTIONS, 80, tmp_path / "words.json")
    conditioning = TextTransformerConfig(
        width=12, layers=1, heads=2, head_dim=4, vocab_size=80, tokenizer=str(tmp_path / "words.json")
    )
    return Bundle(
        first_stage=randomised(AutoencoderKLConfig(**CODEC | {"channel_mult": [1, 1, 2, 2]}).build(), 1),
        unet=randomised(UNetConfig(**TOY, context_dim=12).build(), 2),
        conditioner=randomised(conditioning.build(), 3),
        diffusion=DiffusionConfig(schedule=ScheduleConfig(), objective=ObjectiveConfig(**objective)),
        latent_scale=0.7,
    )


def clip_bundle(tmp_path: Path) -> Bundle:
    """Stable Diffusion v1 in small: letters for words, and f = 2."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "re", "<|startoftext|>", "<|endoftext|>"]
    directory = tmp_path / "clip"
    directory.mkdir()
    (directory / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\nr e\n")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"})
    )
    conditioning = ClipTextConfig(model=str(directory), width=12, layers=1, heads=2, vocab_size=len(tokens))
    return Bundle(
        first_stage=randomised(AutoencoderKLConfig(**CODEC).build(), 1),
        unet=randomised(UNetConfig(**TOY, context_dim=12).build(), 2),
        conditioner=randomised(conditioning.build(), 3),
        diffusion=DIFFUSION,
        latent_scale=0.7,
    )


def unconditional_bundle(first_stage: str) -> Bundle:
    config = FIRST_STAGES[first_stage]
    channels = {"in_channels": config.latent_channels, "out_channels": config.latent_channels}
    return Bundle(
        first_stage=randomised(config.build(), 1),
        unet=randomised(UNetConfig(**TOY | channels).build(), 2),
        conditioner=None,
        diffusion=DIFFUSION,
        latent_scale=0.7,
    )


@torch.no_grad()
def drawn(bundle: Bundle, z_T: Tensor, guidance: float = 1.0) -> Tensor:
    """Our DDIM's images, in [-1, 1]."""
    model = bundle.latent_diffusion()
    told: list[dict[str, Tensor]] = [{}, {}]
    if model.conditioner is not None:
        inputs = (model.conditioner.prepare(CAPTIONS), model.conditioner.null_inputs(len(CAPTIONS)))
        told = [model.conditions(each) for each in inputs]
    denoise = guided_denoiser(model.network, model.schedule, model.objective, told[0], told[1], guidance)
    z_0 = ddim.sample(denoise, z_T, model.schedule.timesteps(STEPS), model.schedule)
    return bundle.first_stage.decode(z_0 / bundle.latent_scale).clamp(-1, 1)


def assert_same_pictures(ours: Tensor, theirs: Any) -> None:
    """`theirs` as pipelines give them: (B, H, W, 3) in [0, 1]."""
    theirs = torch.as_tensor(theirs).permute(0, 3, 1, 2) * 2 - 1
    inside = (ours.abs() < 0.99).float().mean()
    assert ours.shape == theirs.shape and inside > 0.5 and ours.std() > 0.05  # pictures, not saturated noise
    assert (ours - theirs).abs().max() <= 1e-4


def start() -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("prediction", [Prediction.eps, Prediction.v])
def test_text_to_image_pipeline_draws_our_pictures(tmp_path: Path, prediction: Prediction):
    bundle = text_bundle(tmp_path, prediction=prediction)
    assert interop.export(bundle, tmp_path / "out", size=64) == "LDMTextToImagePipeline"
    pipeline = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(CAPTIONS, num_inference_steps=STEPS, guidance_scale=3.0, latents=start(), output_type="np").images
    assert_same_pictures(drawn(bundle, start(), guidance=3.0), theirs)


def test_stable_diffusion_pipeline_draws_our_pictures(tmp_path: Path):
    bundle = clip_bundle(tmp_path)
    assert interop.export(bundle, tmp_path / "out", size=16) == "StableDiffusionPipeline"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(CAPTIONS, num_inference_steps=STEPS, guidance_scale=3.0, latents=start(), output_type="np").images
    assert_same_pictures(drawn(bundle, start(), guidance=3.0), theirs)


@pytest.mark.parametrize("first_stage", ["kl", "vq"])
def test_unconditional_pipeline_draws_our_pictures(tmp_path: Path, first_stage: str):
    bundle = unconditional_bundle(first_stage)
    assert interop.export(bundle, tmp_path / "out", size=16) == "LDMPipeline"
    pipeline = diffusers.LDMPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(6)
    theirs = pipeline(batch_size=2, generator=noise, num_inference_steps=STEPS, output_type="np").images
    shape = (2, *bundle.first_stage.config.latent_shape(16))
    assert_same_pictures(drawn(bundle, torch.randn(shape, generator=torch.Generator().manual_seed(6))), theirs)


@pytest.mark.parametrize("kind", ["text", "clip", "kl", "vq"])
def test_what_is_exported_comes_back(tmp_path: Path, kind: str):
    made = {"text": text_bundle, "clip": clip_bundle}
    bundle = made[kind](tmp_path) if kind in made else unconditional_bundle(kind)
    interop.export(bundle, tmp_path / "out", size=16)
    back = interop.load(tmp_path / "out")
    assert_equal_weights(bundle.latent_diffusion(), back.latent_diffusion())
    assert_equal_weights(bundle.first_stage, back.first_stage)
    assert (back.latent_scale, back.diffusion) == (0.7, bundle.diffusion)
    assert network(back.unet.config) == network(bundle.unet.config)
    assert back.first_stage.config == bundle.first_stage.config
    if back.conditioner is not None:
        assert torch.equal(back.conditioner.prepare(CAPTIONS), bundle.conditioner.prepare(CAPTIONS))


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_unet_both_ways(tmp_path: Path, name: str):
    """Ours in theirs, by their loader; other weights back, as their save_pretrained writes them."""
    config = UNetConfig(**TOY | UNETS[name])
    ours = randomised(config.build(), 4)
    kind = interop.export_unet(ours, tmp_path / "ours", sample_size=8)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "ours").eval()
    generator = torch.Generator().manual_seed(7)
    z, t = torch.randn(2, config.in_channels, 8, 8, generator=generator), torch.tensor([3, 990])
    context = torch.randn(2, 5, 12, generator=generator) if config.context_dim else None
    vector = torch.randn(2, 6, generator=generator) if config.vector_dim else None
    told = {} if context is None else {"encoder_hidden_states": context, "class_labels": vector}
    assert_same_output(ours(z, t, context, vector), theirs(z, t, **told).sample)

    randomised(theirs, 8).save_pretrained(tmp_path / "theirs")
    back = interop.load_unet(tmp_path / "theirs")
    assert network(back.config) == network(config)
    assert_same_output(back(z, t, context, vector), theirs(z, t, **told).sample)


@torch.no_grad()
@pytest.mark.parametrize("name", FIRST_STAGES)
def test_first_stage_both_ways(tmp_path: Path, name: str):
    config = FIRST_STAGES[name]
    ours = randomised(config.build(), 4)
    kind = interop.export_first_stage(ours, tmp_path / "ours", latent_scale=0.7, size=16)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "ours").eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(7)) * 2 - 1

    def encoded() -> Tensor:
        there = theirs.encode(images)
        return there.latents if kind == "VQModel" else there.latent_dist.mean

    assert_same_output(ours.encode(images).mean, encoded())
    assert_same_output(ours.decode(encoded()), theirs.decode(encoded()).sample)

    randomised(theirs, 8).save_pretrained(tmp_path / "theirs")
    back = interop.load(tmp_path / "theirs")
    assert back.first_stage.config == config and back.latent_scale == 0.7 and back.unet is None
    assert_same_output(back.first_stage.encode(images).mean, encoded())
    assert_same_output(back.first_stage.decode(encoded()), theirs.decode(encoded()).sample)


@torch.no_grad()
def test_pipeline_saved_by_diffusers_draws_the_same_here(tmp_path: Path):
    """Other weights than the export's, in files that diffusers and transformers wrote."""
    interop.export(text_bundle(tmp_path), tmp_path / "ours", size=64)
    pipeline = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path / "ours")
    pipeline.set_progress_bar_config(disable=True)
    for seed, part in enumerate((pipeline.vqvae, pipeline.bert, pipeline.unet), 20):
        randomised(part, seed)
    pipeline.save_pretrained(tmp_path / "theirs")
    back = interop.load(tmp_path / "theirs")
    theirs = pipeline(CAPTIONS, num_inference_steps=STEPS, guidance_scale=1.0, latents=start(), output_type="np")
    ours = drawn(back, start())
    assert (ours - (torch.as_tensor(theirs.images).permute(0, 3, 1, 2) * 2 - 1)).abs().max() <= 1e-4


def test_pipeline_draws_the_size_asked_for(tmp_path: Path):
    """LDMTextToImagePipeline takes an eighth of the pixels for the latent; with f = 4 that needs help."""
    bundle = text_bundle(tmp_path)
    first_stage = randomised(AutoencoderKLConfig(**CODEC | {"channel_mult": [1, 2, 2]}).build())
    fields = {"unet": bundle.unet, "conditioner": bundle.conditioner, "diffusion": bundle.diffusion}
    interop.export(Bundle(first_stage=first_stage, latent_scale=1.0, **fields), tmp_path / "out", size=32)
    pipeline = diffusers.LDMTextToImagePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(CAPTIONS[0], num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


@pytest.mark.parametrize("end", End)
@pytest.mark.parametrize("prediction", Prediction)
def test_scheduler_takes_our_steps(prediction: Prediction, end: End):
    config = DiffusionConfig(schedule=ScheduleConfig(end=end), objective=ObjectiveConfig(prediction=prediction))
    assert words.read_scheduler(words.scheduler(config), "here") == config
    theirs = diffusers.DDIMScheduler.from_config(words.scheduler(config))
    theirs.set_timesteps(50)
    schedule, objective = config.schedule.build(), config.objective.build()
    assert theirs.timesteps.tolist() == schedule.timesteps(50)
    z = start().double()
    ours = ddim.sample(
        lambda z_t, t: objective.to_z0(torch.tanh(z_t), z_t, *schedule.at(t)), z, schedule.timesteps(50), schedule
    )
    for t in theirs.timesteps:
        z = theirs.step(torch.tanh(z), t, z).prev_sample
    assert (ours - z).abs().max() <= 1e-4 * z.abs().max()


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("kind", ScheduleKind)
def test_scheduler_has_our_levels(kind: ScheduleKind, zero_terminal_snr: bool):
    config = DiffusionConfig(
        schedule=ScheduleConfig(kind=kind, zero_terminal_snr=zero_terminal_snr),
        objective=ObjectiveConfig(prediction=Prediction.v),
    )
    assert words.read_scheduler(words.scheduler(config), "here") == config
    theirs = diffusers.DDIMScheduler.from_config(words.scheduler(config)).alphas_cumprod.double()
    torch.testing.assert_close(theirs, config.schedule.build().alphas_cumprod, rtol=3e-4, atol=1e-6)


@pytest.mark.parametrize("name", words.SPOKEN)
def test_defaults_are_those_of_diffusers(name: str):
    """A key that a file leaves out means what its class says; a key that we ignore or do not know is at its default."""
    spoken = words.SPOKEN[name]
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    theirs = {key: list(p.default) if isinstance(p.default, tuple) else p.default for key, p in parameters.items()}
    del theirs["self"]
    for key, value in {**spoken.read, **spoken.fixed}.items():
        assert theirs.pop(key) == value, key
    assert [key for key, value in theirs.items() if value is not None and key not in spoken.ignored] == []


REFUSED_UNETS = [
    ("use_linear_projection", True),
    ("norm_eps", 1e-6),
    ("addition_embed_type", "text"),
    ("class_embed_type", "timestep"),
    ("resnet_time_scale_shift", "spatial"),
    ("transformer_layers_per_block", [1, 2]),
    ("attention_head_dim", [2, 3]),
    ("block_out_channels", [16, 24]),
    ("cross_attention_dim", [12, 24]),
    ("down_block_types", ["CrossAttnDownBlock2D", "DownBlock2D"]),
    ("_class_name", "UNet3DConditionModel"),
    ("a_key_of_tomorrow", 3),
]


@pytest.mark.parametrize(("key", "value"), REFUSED_UNETS, ids=[key for key, _ in REFUSED_UNETS])
def test_networks_that_we_have_not_are_refused_by_name(key: str, value: Any):
    config = words.unet(UNetConfig(**TOY | {"context_dim": 12, "attention_factors": [1, 2]}), 8)
    assert words.read_unet(config, "unet/config.json").context_dim == 12
    with pytest.raises(ValueError, match=rf"unet/config\.json: .*{key}"):
        words.read_unet({**config, key: value}, "unet/config.json")


@pytest.mark.parametrize(
    ("key", "value"), [("beta_schedule", "sigmoid"), ("trained_betas", [0.1]), ("prediction_type", "flow")]
)
def test_schedules_that_we_have_not_are_refused_by_name(key: str, value: Any):
    with pytest.raises(ValueError, match=key):
        words.read_scheduler({**words.scheduler(DIFFUSION), key: value}, "scheduler")


REFUSED_EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "heads of several widths": ("num_heads=2", {"attention_factors": [1, 2]}),
    "vector without context": ("vector_dim=6", {"vector_dim": 6}),
    "residual resampling with context": ("residual_resampling", {"residual_resampling": True, "context_dim": 12}),
    "first level wider": ("channel_mult", {"channel_mult": [2, 2]}),
}


@pytest.mark.parametrize("name", REFUSED_EXPORTS)
def test_unets_that_diffusers_has_not_are_refused_by_name(name: str):
    message, changes = REFUSED_EXPORTS[name]
    with pytest.raises(ValueError, match=message):
        words.unet(UNetConfig(**TOY | changes), 8)


def test_first_stages_that_diffusers_has_not_are_refused_by_name():
    with pytest.raises(ValueError, match="Identity"):
        words.first_stage(IdentityConfig(), 1.0, 16)
    with pytest.raises(ValueError, match="embed_dim=4, z_channels=8"):
        words.first_stage(AutoencoderKLConfig(**CODEC, z_channels=8), 1.0, 16)


def test_conditioners_without_a_pipeline_are_refused_before_anything_is_written(tmp_path: Path):
    conditioner = ClassLabelConfig(classes=3, width=12).build()
    bundle = unconditional_bundle("kl")
    unet = UNetConfig(**TOY, context_dim=12).build()
    classes = Bundle(
        first_stage=bundle.first_stage, unet=unet, conditioner=conditioner, diffusion=DIFFUSION, latent_scale=1.0
    )
    with pytest.raises(ValueError, match="no pipeline for a ClassConditioner"):
        interop.export(classes, tmp_path / "out", size=16)
    short = TextTransformerConfig(width=12, layers=1, heads=2, head_dim=4, vocab_size=80, max_length=20).build()
    captions = Bundle(
        first_stage=bundle.first_stage, unet=unet, conditioner=short, diffusion=DIFFUSION, latent_scale=1.0
    )
    with pytest.raises(ValueError, match="max_length=20"):
        interop.export(captions, tmp_path / "out", size=16)
    assert not (tmp_path / "out").exists()


def test_a_model_of_given_embeddings_has_no_pipeline(tmp_path: Path):
    bundle = unconditional_bundle("kl")
    unet = UNetConfig(**TOY, context_dim=12).build()
    with pytest.raises(ValueError, match="context_dim=12"):
        interop.export(dataclasses.replace(bundle, unet=unet), tmp_path / "out", size=16)


def test_vocabulary_alone_is_tokenizer_enough(tmp_path: Path):
    """bert-base-uncased comes as a vocab.txt in old directories."""
    bundle = text_bundle(tmp_path)
    vocabulary = json.loads((tmp_path / "words.json").read_text())["model"]["vocab"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=lambda token: vocabulary[token])))
    expected = bundle.conditioner.prepare(CAPTIONS)
    old = dataclasses.replace(bundle.conditioner.config, tokenizer=str(tmp_path / "old")).build()
    interop.export(dataclasses.replace(bundle, conditioner=old), tmp_path / "out", size=64)
    assert torch.equal(interop.load(tmp_path / "out").conditioner.prepare(CAPTIONS), expected)


def test_a_sampler_unlike_ours_is_mentioned(caplog: pytest.LogCaptureFixture):
    assert words.read_scheduler(words.scheduler(DIFFUSION), "scheduler") == DIFFUSION and not caplog.text
    words.read_scheduler({**words.scheduler(DIFFUSION), "clip_sample": True}, "scheduler")
    assert "scheduler: clip_sample=True there; our samplers take False" in caplog.text


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


def test_wrong_files_are_refused_with_their_keys(tmp_path: Path):
    interop.export_unet(UNetConfig(**TOY).build(), tmp_path, sample_size=8)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    rewrite(file, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(3), "extra": torch.zeros(1)}))
    rewrite(file, lambda tensors: tensors.pop("conv_out.bias"))
    with pytest.raises(ValueError, match=r"1 missing: conv_out.bias; 1 unexpected: extra; 1 mis-shaped: conv_in.bias"):
        interop.load_unet(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        interop.load_unet(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        interop.load_unet(tmp_path)


def test_text_encoder_that_lacks_weights_is_refused(tmp_path: Path):
    interop.export(clip_bundle(tmp_path), tmp_path / "out", size=16)
    file = tmp_path / "out" / "text_encoder" / "model.safetensors"
    name = next(name for name in safetensors.torch.load_file(file) if name.endswith("final_layer_norm.bias"))
    tensors = {key: tensor for key, tensor in safetensors.torch.load_file(file).items() if key != name}
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: .*final_layer_norm\.bias"):
        interop.load(tmp_path / "out")


def test_other_pipelines_are_refused_by_name(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    with pytest.raises(ValueError, match="StableDiffusionXLPipeline; those read here: LDMTextToImagePipeline"):
        interop.load(tmp_path)


class Harmful:
    """Unpickling it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_pickles_hold_tensors_or_are_refused(tmp_path: Path):
    """Old files: a pickle, attention by its names and shapes of before 0.15."""
    ours = randomised(AutoencoderKLConfig(**CODEC).build())
    interop.export_first_stage(ours, tmp_path, latent_scale=1.0, size=16)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = dict(ours.state_dict())
    for name in list(tensors):
        for new, before in old.items():
            if f"attentions.0.{new}." in name:
                tensor = tensors.pop(name)
                tensors[name.replace(new, before)] = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    assert_equal_weights(interop.load_first_stage(tmp_path)[0], ours)
    torch.save({"conv_in.bias": Harmful()}, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.bin is refused"):
        interop.load_first_stage(tmp_path)


def test_weights_in_several_files(tmp_path: Path):
    ours = randomised(UNetConfig(**TOY, context_dim=12).build())
    kind = interop.export_unet(ours, tmp_path / "ours", sample_size=8)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert_equal_weights(interop.load_unet(tmp_path / "theirs"), ours)


def test_command_line_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = text_bundle(tmp_path)
    bundles.save(bundle, tmp_path / "model")
    assert interop.main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--size", "64"]) == 0
    assert "LDMTextToImagePipeline" in capsys.readouterr().out
    assert interop.main(["import", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    shutil.rmtree(tmp_path / "out")  # what was imported stands alone
    back = bundles.load(tmp_path / "back")
    assert_equal_weights(bundle.latent_diffusion(), back.latent_diffusion())
    assert_equal_weights(bundle.first_stage, back.first_stage)
    assert torch.equal(back.conditioner.prepare(CAPTIONS), bundle.conditioner.prepare(CAPTIONS))
    assert interop.main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "nowhere is none of these" in capsys.readouterr().err


def test_a_training_run_is_exported_with_its_first_stage(tmp_path: Path):
    """RUN/weights holds the second stage; RUN/config.json says where the first one lies."""
    bundle = unconditional_bundle("kl")
    first_stage, second = bundles.save(bundle, tmp_path / "parts")
    run = tmp_path / "run"
    shutil.copytree(second, run / "weights")
    with pytest.raises(FileNotFoundError, match="--first-stage"):
        bundles.load(run / "weights")
    (run / "config.json").write_text(json.dumps({"first_stage": {"checkpoint": str(first_stage)}}))
    for loaded in (bundles.load(run), bundles.load(run / "weights", first_stage)):
        assert_equal_weights(loaded.latent_diffusion(), bundle.latent_diffusion())
        assert loaded.latent_scale == 0.7
    alone = bundles.load(first_stage)
    assert_equal_weights(alone.first_stage, bundle.first_stage)
    assert alone.latent_scale == 0.7 and alone.unet is None


CONFIGS = {
    "autoencoder_kl": FIRST_STAGES["kl"],
    "autoencoder_vq": FIRST_STAGES["vq"],
    "unet": UNetConfig(**TOY),
    "diffusion": DiffusionConfig(
        schedule=ScheduleConfig(end=End.clean), objective=ObjectiveConfig(prediction=Prediction.v)
    ),
    "class_label": ClassLabelConfig(),
    "clip_text": ClipTextConfig(),
    "text_transformer": TextTransformerConfig(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_written_as_the_jobs_write_them(name: str):
    config = CONFIGS[name]
    assert bundles.to_plain(config)["schema"] == name
    assert bundles.to_plain(config) == jobs_config.to_plain(config)
    assert bundles.from_plain(json.loads(json.dumps(bundles.to_plain(config)))) == config
