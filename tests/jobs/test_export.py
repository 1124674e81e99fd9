"""Weights out of a run: the same pictures from the run and from what was exported, in both layouts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.interop import bundle
from ldm_scale.jobs import export
from ldm_scale.training.checkpoint_files import find, read_consolidated

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def trained(world: Any) -> RunDir:
    overrides = ("name=exported", "total_images=32", "every.save=16", "ema_half_lives=[32,64]", "every.evaluate=0")
    world.run(world.tiny_training(*overrides))
    return RunDir(world.path / "runs" / "txt2img_laion" / "exported")


def drawn(world: Any, out: Path, *model: str) -> list[np.ndarray]:
    prompts = "prompts=[a small red circle at the top on a white background,a large blue square]"
    same = ("sampler.steps=2", "sampler.guidance=2", "size=[32,32]")
    world.run(world.job("sample.py", *model, prompts, f"out={out}", *same))
    return [np.asarray(Image.open(file)) for file in sorted(out.glob("0*.png"))]


def test_the_same_pictures_from_the_run_and_from_the_export(
    world: Any, trained: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.path)
    assert export.main([str(trained.path), str(tmp_path / "model")]) == 0
    ours = drawn(world, tmp_path / "a", f"model={tmp_path / 'model'}")
    theirs = drawn(world, tmp_path / "b", f"run_dir={trained.path}")
    raw = drawn(world, tmp_path / "c", f"run_dir={trained.path}", "weights=raw")
    assert len(ours) == 2 and all(np.array_equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert not np.array_equal(ours[0], raw[0])


def test_an_export_is_an_artifact_where_it_is_asked_for(world: Any, trained: RunDir, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ldm_scale.jobs.export", str(trained.path), str(tmp_path / "model")]
    said = world.run([*command, "--artifact", "references"])
    (part,) = (trained.path / "export" / "wandb").glob("offline-run-*")
    assert f"wandb sync {part}" in said
    leet = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(part)]
    lines = subprocess.run(leet, capture_output=True, text=True, check=True).stdout.splitlines()
    (artifact,) = (one["artifact"] for one in map(json.loads, lines) if one["type"] == "artifact")
    found = {one["path"]: one["ref"].removeprefix("file://") for one in artifact["manifest"]["contents"]}
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert found == {str(path.relative_to(tmp_path / "model")): str(path) for path in files}
    assert json.loads(artifact["metadata"])["weights"] == "ema" and "images_32" in artifact["aliases"]


@pytest.mark.parametrize("which, kind", [("raw", "weight"), ("ema", "ema/32"), ("ema/64", "ema/64")])
def test_any_weights_of_any_checkpoint(
    world: Any, trained: RunDir, tmp_path: Path, which: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.path)
    checkpoint = trained.checkpoints / "images_000000000016"
    assert export.main([str(checkpoint), str(tmp_path), "--weights", which]) == 0
    held = bundle.load(tmp_path).latent_diffusion().state_dict()
    for name, tensor in read_consolidated(checkpoint, kind)[1].items():
        assert torch.equal(held[name], tensor), name
    said = storage.read_json(tmp_path / "export.json")
    assert said == {"checkpoint": str(checkpoint.resolve()), "weights": which, "images_seen": 16}
    tokenizer = storage.read_json(tmp_path / "latent_diffusion" / "config.json")["latent_diffusion"]["conditioning"]
    assert tokenizer["tokenizer"] == str((tmp_path / "tokenizer.json").resolve())


def test_a_first_stage_and_its_diffusers_layout_decode_alike(world: Any, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    run = RunDir(world.path / "runs" / "autoencoder_kl_f4" / "toy")
    assert export.main([str(run.path), str(tmp_path), "--diffusers"]) == 0
    ours = bundle.load(tmp_path).first_stage.eval()
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "diffusers").eval()
    z_BCHW = torch.randn(2, ours.latent_channels, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z_BCHW), theirs.decode(z_BCHW).sample, rtol=1e-4, atol=1e-4)
    kind = f"ema/{storage.read_json(run.config)['ema_half_lives'][0]}"
    _, averaged = read_consolidated(find(run.checkpoints), kind)
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in averaged.items())


def test_what_is_not_there_is_refused(
    world: Any,
    trained: RunDir,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(world.path)

    def refusal(*arguments: str) -> str:
        assert export.main([*arguments[:1], str(tmp_path / "out"), *arguments[1:]]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "neither a training run" in refusal(str(tmp_path))
    assert "ema/32, ema/64" in refusal(str(trained.path), "--weights", "ema/99")
    assert "complete ones, newest first" in refusal(str(trained.checkpoints / "images_000000000001"))
    assert "pad captions" in refusal(str(trained.path), "--diffusers")
