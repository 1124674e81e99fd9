"""Import of original checkpoints, against networks written for the tests (compvis_reference.py)."""

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import compvis_configs
import compvis_reference
import pytest
import safetensors.torch
import torch
import yaml
from compvis_configs import small
from torch import Tensor

from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.core import weights
from ldm_scale.diffusion.objective import Loss, Prediction
from ldm_scale.interop import compvis, compvis_config, compvis_names
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading
from ldm_scale.jobs.fetch_weights import import_first_stage

Make = Callable[..., Any]
SLOW = {"stable_diffusion": [pytest.mark.slow]}  # transformers takes seconds to import


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def inputs_of_conditioner(name: str) -> Tensor | None:
    generator = torch.Generator().manual_seed(5)
    if name in ("txt2img", "layout", "stable_diffusion"):
        return torch.randint(0, 48, (2, 8), generator=generator)
    if name == "class":
        return torch.tensor([3, 11])
    return torch.randint(0, 9, (2, 8, 8), generator=generator) if name == "semantic" else None


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in compvis_configs.SMALL])
@torch.no_grad()
def test_outputs_are_the_originals(name: str, original: Make) -> None:
    made = original(name)
    bundle = compvis.load(made.config, made.checkpoint)
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, bundle.unet.config.in_channels, 8, 8, generator=generator)
    t, context = torch.tensor([0, 700]), None
    if bundle.unet.config.context_dim:
        context = torch.randn(2, 5, bundle.unet.config.context_dim, generator=generator)
    close(bundle.unet(z, t, context), made.model.unet(z, t, context))
    images = torch.randn(2, 3, 16, 16, generator=generator)
    theirs, moments = made.model.first_stage_model.encode(images), bundle.first_stage.encode(images)
    close(moments.mean, theirs[0])
    if theirs[1] is not None:
        close(moments.logvar, theirs[1])
    close(bundle.first_stage.decode(theirs[0]), made.model.first_stage_model.decode(theirs[0]))
    inputs = inputs_of_conditioner(name)
    if inputs is not None:
        given = bundle.conditioner(inputs)
        close(given.context if given.concat is None else given.concat, made.model.cond_stage_model(inputs))
    if name != "embeddings":  # they come from outside
        bundle.latent_diffusion()  # the parts fit one another


def test_a_conditioner_is_what_the_configuration_says(original: Make) -> None:
    def load(name: str) -> Any:
        made = original(name)
        return compvis.load(made.config, made.checkpoint).conditioner

    assert load("class").config == ClassLabelConfig(classes=12, null_class=False, width=16, dropout=0.0)
    assert load("layout").config == LayoutConfig(width=24, layers=2, vocab_size=50, max_objects=2, crop=True)
    assert load("inpainting").config.channels == 4
    assert load("superres").config.channels == 3
    assert load("churches") is None


def test_the_published_class_model_has_a_null_class(tmp_path: Path) -> None:
    said = described(compvis_configs.MODELS["cin256-v2"][0], tmp_path)
    assert said.conditioning == ClassLabelConfig(classes=1000, null_class=True, width=512)


def test_schedule_objective_and_scale(original: Make) -> None:
    made = original("txt2img")
    bundle = compvis.load(made.config, made.checkpoint)
    assert bundle.latent_scale == bundle.first_stage.config.scale == 0.18215
    assert bundle.unet.config.activation_checkpointing == ["resnet", "attention"]  # use_checkpoint
    assert (bundle.diffusion.objective.prediction, bundle.diffusion.objective.loss) == (Prediction.eps, Loss.l2)
    # facts.md 5.3
    assert [bundle.schedule.alphas_cumprod[t].item() for t in (0, 499, 999)] == pytest.approx(
        [0.99915, 0.27766965, 0.0046600985], rel=1e-6
    )
    made = original("churches")
    bundle = compvis.load(made.config, made.checkpoint)
    assert bundle.latent_scale == bundle.first_stage.config.scale == 0.625  # scale_by_std: the checkpoint's
    assert bundle.diffusion.objective.loss is Loss.l1


@pytest.mark.parametrize("name", ["kl", "vq"])
@torch.no_grad()
def test_a_first_stage_alone(name: str, original: Make, tmp_path: Path) -> None:
    config = small("txt2img" if name == "kl" else "celeba")["params"]["first_stage_config"]
    made = original(config)
    held = torch.load(made.checkpoint, weights_only=True)
    held["state_dict"]["loss.discriminator.main.0.weight"] = torch.zeros(3)
    torch.save(held, made.checkpoint)
    bundle = compvis.load(made.config, made.checkpoint)
    assert bundle.unet is bundle.conditioner is bundle.diffusion is None
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    close(bundle.first_stage.encode(images).mean, made.model.encode(images)[0])


# Which weights --------------------------------------------------------------------------------------------------------


def test_averages_are_preferred_and_raw_chooses_the_others(original: Make) -> None:
    made = original("txt2img", averaged=True)
    theirs = made.model.unet.state_dict()["input_blocks.1.0.in_layers.2.weight"]
    for raw, expected in ((False, theirs / 2), (True, theirs)):
        bundle = compvis.load(made.config, made.checkpoint, raw=raw)
        assert torch.equal(bundle.unet.down_blocks[0].resnets[0].conv1.weight, expected)
        token = made.model.cond_stage_model.transformer.token_emb.weight
        assert torch.equal(bundle.conditioner.transformer.model.embed_tokens.weight, token)  # has no average


def test_half_an_average_is_refused(original: Make) -> None:
    made = original("celeba", averaged=True)
    held = torch.load(made.checkpoint, weights_only=True)
    del held["state_dict"]["model_ema.diffusion_modeltime_embed0weight"]
    held["state_dict"]["model_ema.diffusion_modelnothing"] = torch.zeros(1)
    torch.save(held, made.checkpoint)
    with pytest.raises(ValueError, match=r"1 weights have no average .*time_embed\.0\.weight; .*raw=True"):
        compvis.load(made.config, made.checkpoint)
    compvis.load(made.config, made.checkpoint, raw=True)


def test_averages_of_a_first_stage_alone(original: Make) -> None:
    made = original(small("celeba")["params"]["first_stage_config"])
    held = torch.load(made.checkpoint, weights_only=True)
    kept = {"model_ema." + name.replace(".", ""): tensor / 2 for name, tensor in held["state_dict"].items()}
    lossy = {"loss.logvar": torch.zeros(()), "loss.lin.weight": torch.zeros(2), "model_ema.losslogvar": torch.ones(())}
    torch.save({"state_dict": held["state_dict"] | kept | lossy}, made.checkpoint)
    bundle = compvis.load(made.config, made.checkpoint)
    assert torch.equal(bundle.first_stage.encoder.conv_in.weight, made.model.encoder.conv_in.weight / 2)


@pytest.mark.parametrize("how", ["bare", "safetensors", "half"])
def test_other_wrappings(how: str, original: Make) -> None:
    made = original("celeba")
    tensors = torch.load(made.checkpoint, weights_only=True)["state_dict"]
    path = made.checkpoint
    if how == "safetensors":
        path = made.checkpoint.with_suffix(".safetensors")
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:
        torch.save({n: t.half() if how == "half" else t for n, t in tensors.items()}, path)
    weight = compvis.load(made.config, path).unet.conv_in.weight
    expected = made.model.unet.input_blocks[0][0].weight
    assert weight.dtype is torch.float32
    assert torch.equal(weight, expected.half().float() if how == "half" else expected)


# What is refused ------------------------------------------------------------------------------------------------------


def test_another_architecture_is_listed(original: Make) -> None:
    made = original("txt2img")
    config = yaml.safe_load(made.config.read_text())
    config["model"]["params"]["unet_config"]["params"] |= {"attention_resolutions": [2], "in_channels": 5}
    config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["attn_resolutions"] = [128, 256]
    made.config.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"model\.ckpt holds another architecture") as caught:
        compvis.load(made.config, made.checkpoint)
    message = str(caught.value)
    assert "missing: first_stage.decoder.up_blocks.1.attentions.0.group_norm.bias" in message
    assert "unexpected: model.diffusion_model.input_blocks.1.1.norm.bias" in message
    assert "unet.conv_in.weight (32, 4, 3, 3), wanted (32, 5, 3, 3)" in message


def test_joint_projections_of_another_width_are_mis_shaped(original: Make) -> None:
    made = original("celeba")
    held = torch.load(made.checkpoint, weights_only=True)
    held["state_dict"]["model.diffusion_model.middle_block.1.qkv.weight"] = torch.zeros(100, 64, 1)
    torch.save(held, made.checkpoint)
    with pytest.raises(ValueError, match=r"3 mis-shaped: unet\.mid_block\.attentions\.0\.to_k\.weight \(100, 64\)"):
        compvis.load(made.config, made.checkpoint)


def test_a_second_first_stage_must_be_a_copy(original: Make) -> None:
    made = original("inpainting")
    held = torch.load(made.checkpoint, weights_only=True)
    name = "cond_stage_model.encoder.conv_in.weight"
    held["state_dict"][name] = held["state_dict"][name] + 1
    torch.save(held, made.checkpoint)
    with pytest.raises(ValueError, match=rf"1 unexpected: {name}"):
        compvis.load(made.config, made.checkpoint)


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused(
    zipped: bool, original: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = original("celeba")
    torch.save({"state_dict": {}, "extra": Harm()}, made.checkpoint, _use_new_zipfile_serialization=zipped)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"model\.ckpt is refused: .* names posix\.mkdir, .*safetensors"):
        compvis.load(made.config, made.checkpoint)
    assert not (tmp_path / "harmed").exists()


def test_the_state_of_lightning_is_dropped(original: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = original("celeba")
    held = torch.load(made.checkpoint, weights_only=True)
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(__import__("sys").modules, name, type("Module", (), {"ModelCheckpoint": callback}))
    torch.save(held | {"callbacks": {callback: {"best": 1.0}}}, made.checkpoint)
    compvis.load(made.config, made.checkpoint)
    torch.save(held | {"state_dict": {"a": callback()}}, made.checkpoint)
    with pytest.raises(ValueError, match="not only tensors: a;"):
        compvis.load(made.config, made.checkpoint)


@pytest.mark.parametrize(
    "content, message",
    [(b"", "damaged"), (b"PK\x03\x04 cut short", "damaged"), (b"\x80\x02]q\x00.", "damaged"), (None, "no such file")],
)
def test_damaged_and_absent_files_are_refused(content: bytes | None, message: str, original: Make) -> None:
    made = original("celeba")
    for path in (made.checkpoint, made.checkpoint.with_suffix(".safetensors")):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            compvis.load(made.config, path)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("celeba", {"unet_config__n_embed": 8192}, r"unet_config\.params\.n_embed=8192 is a network that is not here"),
        ("celeba", {"unet_config__num_classes": 10}, r"unet_config\.params\.num_classes=10"),
        ("celeba", {"unet_config__use_linear_in_transformer": True}, r"use_linear_in_transformer=True: unknown here"),
        ("celeba", {"unet_config__model_channels": "wide"}, r"model_channels='wide'; must be an integer"),
        ("celeba", {"first_stage_config__ddconfig__attn_type": "linear"}, r"ddconfig\.attn_type='linear'; known: van"),
        ("celeba", {"first_stage_config__ddconfig__tanh_out": True}, r"ddconfig\.tanh_out=True"),
        ("celeba", {"first_stage_config__ddconfig__double_z": True}, r"ddconfig\.double_z must be False"),
        ("celeba", {"first_stage_config__remap": "some.npy"}, r"first_stage_config\.params\.remap='some\.npy'"),
        ("celeba", {"beta_schedule": "cosine"}, r"model\.params\.beta_schedule='cosine'"),
        ("celeba", {"parameterization": "score"}, r"model\.params\.parameterization='score'; known: eps, x0, v"),
        ("celeba", {"split_input_params": {"ks": [128, 128]}}, r"model\.params\.split_input_params="),
        ("celeba", {"linear_end": 0.0205}, r"trained with 1000 noise levels ending at .*0\.000142; .*9\.69e-05"),
        ("celeba", {"scale_by_std": True}, r"has no scale_factor, which .*scale_by_std=true asks for"),
        ("churches", {"scale_by_std": False}, r"scale_factor 0\.625, but .*model\.params\.scale_factor=1;"),
        ("class", {"conditioning_key": "hybrid"}, r"conditioning_key='hybrid' with .*ClassEmbedder; known: crossattn"),
        ("class", {"cond_stage_config": {"target": "os.system"}}, r"cond_stage_config\.target='os\.system'; known: "),
        ("class", {"unet_config__context_dim": [16]}, r"context_dim=\[16\]; a spatial transformer needs one width"),
        ("layout", {"cond_stage_config__max_seq_len": 7}, r"max_seq_len=7 is no layout"),
        ("semantic", {"cond_stage_config__method": "nearest"}, r"cond_stage_config\.params\.method='nearest'"),
        ("txt2img", {"cond_stage_config__embedding_dropout": 0.5}, r"embedding_dropout=0\.5"),
    ],
)
def test_what_would_be_another_network_is_refused(
    name: str, changes: dict[str, Any], message: str, original: Make
) -> None:
    made = original(name)
    made.config.write_text(yaml.safe_dump({"model": small(name, **changes)}))
    with pytest.raises(ValueError, match=message):
        compvis.load(made.config, made.checkpoint)


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: {target: ldm.models.diffusion.ddpm.DDPM}", r"model\.target='ldm\..*DDPM'; known: ldm\.models"),
        ("model: 3", r"model=3; must name a target"),
        ("first_stage: {}", "no key `model`"),
        ("model: [", "is not YAML"),
        ("model: !!python/object/apply:os.system [true]", "is not YAML"),
    ],
)
def test_files_that_are_no_configuration_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        compvis_config.read(tmp_path / "config.yaml")


# The command line -----------------------------------------------------------------------------------------------------


def test_command_line_writes_what_jobs_read(original: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, out = original("txt2img", averaged=True), tmp_path / "out"
    assert compvis.main([str(made.config), str(made.checkpoint), str(out), "--raw"]) == 0
    printed = capsys.readouterr().out
    assert f"+experiment=NAME first_stage.checkpoint={out / 'first_stage'}\n" in printed
    bundle = compvis.load(made.config, made.checkpoint, raw=True)
    assert f"{sum(p.numel() for p in bundle.unet.parameters()):,} parameters" in printed

    held = weights.load(out / "first_stage")
    config = jobs_config.from_plain("first_stage", held.config["first_stage"])
    assert config == bundle.first_stage.config
    for checkpoint in (out, out / "first_stage"):
        named = replace(config, checkpoint=str(checkpoint), scale=None)
        assert loading.first_stage(named).digest() == bundle.first_stage.digest()
        assert loading.stated_scale(named) == 0.18215

    held = weights.load(out / "latent_diffusion")
    model = bundle.latent_diffusion()
    assert held.config == {"latent_diffusion": jobs_config.to_plain(model.config), "latent_scale": 0.18215}
    assert weights.digest(held.tensors) == weights.digest(model.state_dict())


def test_command_line_refuses_in_one_line(original: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = original("celeba")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert compvis.main([str(made.config), str(made.checkpoint), str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
    made.checkpoint.unlink()
    assert compvis.main([str(made.config), str(made.checkpoint), str(tmp_path / "new")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# At full scale --------------------------------------------------------------------------------------------------------


def described(config: dict[str, Any], path: Path) -> compvis_config.Described:
    (path / "config.yaml").write_text(yaml.safe_dump({"model": config}))
    return compvis_config.read(path / "config.yaml")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", compvis_configs.FIRST_STAGES)
def test_full_scale_first_stages(name: str, tmp_path: Path) -> None:
    config, parameters, tensors = compvis_configs.FIRST_STAGES[name]
    with torch.device("meta"):
        network = described(config, tmp_path).first_stage.build()
        names = compvis_reference.instantiate(config).state_dict().keys()
    assert (count(network), len(names)) == (parameters, tensors)
    assert {source.name for source in compvis_names.first_stage(network).values()} == names


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW.get(n, ())) for n in compvis_configs.MODELS])
def test_full_scale_models(name: str, tmp_path: Path) -> None:
    config, parameters, tensors, of_conditioner = compvis_configs.MODELS[name]
    said = described(config, tmp_path)
    assert said.unet is not None
    with torch.device("meta"):
        unet = said.unet.build()
        conditioner = None if said.conditioning is None else said.conditioning.build()
        names = compvis_reference.instantiate(config["params"]["unet_config"]).state_dict().keys()
    assert (count(unet), len(names)) == (parameters, tensors)
    assert {source.name for source in compvis_names.unet(unet, said.head_order).values()} == names
    assert (0 if conditioner is None else count(conditioner)) == of_conditioner


def test_full_scale_text_transformer(tmp_path: Path) -> None:
    config = compvis_configs.MODELS["txt2img-1p4B"][0]
    conditioning = described(config, tmp_path).conditioning
    assert conditioning is not None
    with torch.device("meta"):
        sources = compvis_names.conditioner(conditioning.build())
        names = compvis_reference.instantiate(config["params"]["cond_stage_config"]).state_dict().keys()
    assert len(names) == 422  # facts.md 6.1
    assert names - {source.name for source in sources.values()} == {
        "transformer.to_logits.weight",
        "transformer.to_logits.bias",
    }


def test_the_first_stage_that_is_fetched_becomes_a_weights_directory(original: Make, tmp_path: Path) -> None:
    given, fetched = original(compvis_configs.kl(4, [1, 2], [], ch=32)), tmp_path / "weights/kl_f8/original"
    fetched.mkdir(parents=True)
    shutil.copy(given.config, fetched)
    with zipfile.ZipFile(fetched / "model.zip", "w") as archive:
        archive.write(given.checkpoint, "model.ckpt")
    import_first_stage("kl_f8", tmp_path / "weights")
    held = loading.described_first_stage(f"{tmp_path}/weights/kl_f8")
    assert held.digest() == compvis.load(given.config, given.checkpoint).first_stage.digest()
    assert loading.stated_scale(replace(held.config, scale=None)) == 0.18215
    assert sorted(path.name for path in fetched.iterdir()) == ["config.yaml", "model.zip"]
