"""`init=`: a new run that starts from another one's weights, or from a model directory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.interop import bundle
from ldm_scale.training.checkpoint_files import find, read_consolidated, read_state

pytestmark = pytest.mark.slow

STEADY = ["optimizer.schedule=constant", "optimizer.warmup_images=0"]  # a rate that does not depend on the length
FROZEN = ["optimizer.learning_rate=1e-30", "optimizer.weight_decay=0"]  # weights stay where they begin


@pytest.fixture(scope="session")
def parent(world: Any) -> RunDir:
    world.run(world.tiny_training("name=parent", "total_images=32", *STEADY))
    return RunDir(world.path / "runs" / "txt2img_laion" / "parent")


def child(world: Any, name: str, *overrides: str) -> RunDir:
    world.run(world.tiny_training(f"name={name}", "total_images=8", *STEADY, *FROZEN, *overrides))
    return RunDir(world.path / "runs" / "txt2img_laion" / name)


def start_of(run: RunDir) -> dict[str, Any]:
    events = [json.loads(line) for line in run.events.read_text().splitlines()]
    return next(event for event in events if event["event"] == "start")


@pytest.mark.parametrize("what, kind", [("weights", "weight"), ("ema", "ema/32")])
def test_a_branch_starts_at_its_parents_numbers(world: Any, parent: RunDir, what: str, kind: str) -> None:
    run = child(world, f"from_{what}", f"init={parent.path}", f"init_what={what}")
    theirs = read_consolidated(find(parent.checkpoints), kind)[1]
    for ours in ("weight", "ema/32"):  # averages begin at the weights
        found = read_consolidated(find(run.checkpoints), ours)[1]
        for name, tensor in theirs.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
    assert start_of(run)["parent"] == {"path": str(find(parent.checkpoints)), "kind": kind}
    assert start_of(run)["images_seen"] == 0


def test_a_branch_with_everything_goes_on_where_its_parent_stood(world: Any, parent: RunDir) -> None:
    checkpoint = find(parent.checkpoints)
    world.run(world.tiny_training("name=goes_on", "total_images=64", *STEADY, f"init={checkpoint}", "init_what=all"))
    world.run(world.tiny_training("name=undivided", "total_images=64", *STEADY))
    runs = world.path / "runs" / "txt2img_laion"
    assert start_of(RunDir(runs / "goes_on"))["images_seen"] == 32
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema/32"):  # nothing was configured otherwise: the same run, split
        ours, whole = (
            read_consolidated(find(runs / name / "checkpoints"), kind)[1] for name in ("goes_on", "undivided")
        )
        assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items())


def test_a_model_directory_is_trained_further(world: Any, parent: RunDir, tmp_path: Path) -> None:
    """As `python -m ldm_scale.interop.compvis` writes them from published checkpoints."""
    saved = bundle.load(parent.path)
    bundle.save(saved, tmp_path / "model")
    run = child(world, "from_model", f"init={tmp_path / 'model'}", f"first_stage.scale={saved.latent_scale}")
    found = read_consolidated(find(run.checkpoints), "weight")[1]
    for name, tensor in saved.latent_diffusion().state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_relaunch_goes_on_with_its_own_checkpoint(world: Any, parent: RunDir) -> None:
    command = world.tiny_training("name=relaunched", *STEADY, f"init={parent.path}")
    world.run([*command, "total_images=32"])
    run = RunDir(world.path / "runs" / "txt2img_laion" / "relaunched")
    world.run([*command, "total_images=64", "amend=true"])
    assert read_state(find(run.checkpoints))["images_seen"] == 64
    begins = [json.loads(line) for line in run.events.read_text().splitlines()]
    assert [e["parent"] is None for e in begins if e["event"] in ("start", "resume")] == [False, True]


def test_what_cannot_be_a_parent_is_refused_before_anything_is_built(world: Any, parent: RunDir) -> None:
    def refusal(*overrides: str) -> str:
        return world.refusal(world.tiny_training("name=refused", *overrides))

    assert "is none of these: a training run" in refusal("init=nowhere")
    first_stage = world.path / "runs" / "autoencoder_kl_f4" / "toy"
    assert "trained a first stage" in refusal(f"init={first_stage}")
    assert "holds one set of weights" in refusal(f"init={parent.weights}", "init_what=all")
    out = refusal(f"init={parent.path}", "unet.model_channels=24")
    assert "holds another architecture" in out and "mis-shaped" in out
    assert "unet.model_channels=16 (now 24)" in out
    scale = storage.read_json(parent.weights / "config.json")["latent_scale"]
    assert f"set first_stage.scale={scale:.5g}" in refusal(f"init={parent.path}", "first_stage.scale=0.7")
