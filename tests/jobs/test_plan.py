"""The plan: closed forms beside hand arithmetic, and checks that fail on planted faults."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from ldm_scale.core import storage
from ldm_scale.jobs import config, plan, preflight, speed, train
from ldm_scale.jobs.footprint import _Fused, _Live, activation_bytes, checkpointing_everything, footprint
from ldm_scale.jobs.preflight import Check, Needs
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.speed import MACHINES, Work
from ldm_scale.tracking.cost import Forecast
from ldm_scale.training.engine import EngineKind, Precision

H100 = MACHINES["h100"]
TXT2IMG = 872_300_484 + 581_994_042 - 39_098_682  # facts.md 2.1, without the head that nothing reads
Job = Callable[..., TrainJob]


@pytest.fixture(scope="module")
def laion() -> TrainJob:
    job: TrainJob = config.compose("train", ["+experiment=txt2img_laion", "name=x"])
    return job


def test_the_figures_of_the_published_model(laion: TrainJob) -> None:
    found = plan.measure(laion)
    assert found.parameters == TXT2IMG
    assert found.beside_bytes == 4 * 83_653_863
    assert found.encoder_flops == pytest.approx(272.72e9, rel=1e-3)
    assert found.training_flops == pytest.approx(0.78e12, rel=1e-2)  # operations.md 1


def test_memory_of_zero1_on_eight_gpus_by_hand() -> None:
    found = footprint(EngineKind.zero1, Precision.bf16, parameters=8_000, world=8, averages=2, activations=50)
    assert (found.weights, found.gradients) == (2 * 8_000, 4 * 8_000)
    assert (found.optimizer, found.averages) == ((4 + 8) * 1_000, 2 * 4 * 1_000)
    assert found.transient == 4 * 8_000  # gradients flattened, when the activations are gone
    assert found.total == 16_000 + 32_000 + 12_000 + 8_000 + 32_000


@pytest.mark.parametrize(
    "kind, precision, a_parameter",
    [
        (EngineKind.one_process, Precision.fp32, 4 + 4 + 8 + 4),  # weight, gradient, moments, one average
        (EngineKind.one_process, Precision.bf16, 20 + 2),  # and autocast's copy
        (EngineKind.ddp, Precision.bf16, 22 + 4),  # and DDP's buckets
        (EngineKind.zero2, Precision.fp32, 4 + (4 + 12 + 4) / 4 + 4 + 4),  # the bucket, and its copy
        (EngineKind.zero3, Precision.fp32, (4 + 4 + 8 + 4) / 4 + 8 + 4 + 4 / 4),  # gradients, flattened
    ],
)
def test_memory_of_a_parameter_on_four_processes(kind: EngineKind, precision: Precision, a_parameter: float) -> None:
    assert footprint(kind, precision, parameters=4_000, world=4, averages=1).total == 4_000 * a_parameter


def test_live_bytes_are_what_autograd_keeps() -> None:
    """Of linear, square, linear: what the square reads, what the second product reads, and the output while held."""
    first, second = nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False)
    x_BC, live = torch.randn(4, 16), _Live(nn.ModuleList((first, second)))
    with live:
        out = second(first(x_BC).square())
        assert live.bytes == 4 * 4 * (32 + 32 + 8)
    assert out.shape == (4, 8)


def test_attention_keeps_its_inputs_and_output() -> None:
    q_BNLK = torch.randn(1, 2, 64, 8, requires_grad=True)
    live = _Live(nn.Identity())
    with live, _Fused():
        out = functional.scaled_dot_product_attention(q_BNLK, q_BNLK, q_BNLK)
    assert live.bytes == out.nbytes + 4 * 2 * 64  # not the 2 x 64 x 64 weights


@pytest.mark.slow
def test_activations_grow_with_the_batch_and_shrink_with_recomputation(laion: TrainJob) -> None:
    one, four = (activation_bytes(laion, Precision.bf16, batch) for batch in (1, 4))
    assert four == pytest.approx(4 * one, rel=0.02)
    assert activation_bytes(laion, Precision.fp32, 1) > 1.5 * one
    assert activation_bytes(checkpointing_everything(laion), Precision.bf16, 4) < four / 2


@pytest.mark.slow
def test_what_judges_a_first_stage_is_in_its_plan() -> None:
    """VGG16's convolutions at 256 x 256: 20.0 billion multiplications of two, forward twice, backward twice."""
    whole, alone = (
        config.compose("train", ["+experiment=autoencoder_kl_f8", "name=x", *without])
        for without in ([], ["autoencoder_loss.perceptual=none", "autoencoder_loss.adversarial.kind=none"])
    )
    found, plain = plan.measure(whole), plan.measure(alone)
    discriminator = 2_764_737  # three layers of 64 channels
    assert plain.beside_bytes == 0
    assert found.beside_bytes == pytest.approx(4 * 14.71e6 + 16 * discriminator, rel=1e-3)
    assert found.training_flops - plain.training_flops > 4 * 2 * 20.0e9
    kept, bare = (activation_bytes(job, Precision.fp32, 1) for job in (whole, alone))
    assert kept > bare + 2 * 4 * 64 * 256**2  # what VGG's first layer makes of an image and of its reconstruction


def work(kind: EngineKind, **changed: Any) -> Work:
    asked: dict[str, Any] = {
        "kind": kind, "precision": Precision.bf16, "parameters": 1000, "averages": 1, "flops_per_image": 1e12,
        "recomputed": False,
    }  # fmt: skip
    return Work(**(asked | changed))


@pytest.mark.parametrize(
    "kind, bytes_",
    [
        (EngineKind.one_process, 0),
        (EngineKind.ddp, 2 * 0.75 * 4000),
        (EngineKind.zero1, 2 * 0.75 * 4000 + 0.75 * 2000),
        (EngineKind.zero2, 3 * 2 * 0.75 * 4000 + 0.75 * 2000),
        (EngineKind.zero3, 3 * (0.75 * 4000 + 2 * 0.75 * 2000)),
    ],
)
def test_what_each_engine_sends(kind: EngineKind, bytes_: float) -> None:
    assert speed.traffic(work(kind), world=4, accumulation=3) == bytes_


def test_a_step_by_hand() -> None:
    big = work(EngineKind.ddp, parameters=10**9)
    found = speed.step(big, H100, world=4, micro_batch=8, accumulation=2)
    assert found.arithmetic == 16 * 1e12 / H100.matmul
    assert found.network == 2 * 0.75 * 4e9 / H100.bus
    assert found.exposed == pytest.approx(0.4 * found.network)  # the rest is beside the backward pass
    assert found.update == 1e9 * 40 / H100.memory_bandwidth
    assert found.mfu(big, H100) == pytest.approx(16 * 1e12 / found.seconds / H100.peak)
    after = speed.step(work(EngineKind.zero1, parameters=10**9), H100, world=4, micro_batch=8, accumulation=2)
    assert after.exposed == after.network and after.update == found.update / 4


def test_the_knee_moves_with_the_bus() -> None:
    def knee(bus: float) -> int | None:
        machine = replace(H100, bus=bus)
        big = work(EngineKind.ddp, parameters=10**9)
        worlds = (8, 16, 32, 64)
        steps = [speed.step(big, machine, world=n, micro_batch=512 // n, accumulation=1) for n in worlds]
        return speed.knee(steps)

    assert [knee(bus) for bus in (10e9, 250e9, 1000e9)] == [None, 32, 64]


@pytest.fixture
def job(world: Any, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The tiny training, composed here."""
    monkeypatch.chdir(world.path)
    monkeypatch.setenv("WANDB_MODE", "offline")

    def compose(*overrides: str) -> TrainJob:
        found: TrainJob = config.compose("train", world.tiny_training("name=planned", *overrides)[2:])
        return found

    return compose


def checked(job: TrainJob, **needs: int) -> dict[str, Check]:
    asked = {"world": 1, "checkpoint_bytes": 1, "checkpoints": 1, "gpu_bytes": 1, "gpu_memory": 2}
    return {check.name: check for check in preflight.checks(job, Needs(**(asked | needs)))}


@pytest.mark.slow
def test_a_sound_job_has_nothing_to_fear(job: Job) -> None:
    found = checked(job())
    assert {check.state for check in found.values()} == {"ok"}, found
    assert "96 latents" in found["data"].said


@pytest.mark.slow
@pytest.mark.parametrize(
    "check, said, overrides, needs",
    [
        ("batch", "does not divide", ["global_batch=9"], {}),
        ("engine", "one_process on 2 GPUs", ["micro_batch=4"], {"world": 2}),
        ("memory", "does not fit", [], {"gpu_bytes": 3}),
        ("first stage", "neither weights nor a finished", ["first_stage.checkpoint=nowhere"], {}),
        ("conditions", "has 128 tokens", ["conditioning.vocab_size=64"], {}),
        ("data", "image transform", ["data.transform.border=keep"], {}),
        ("data", "nowhere", ["data.images=null", "data.latents=nowhere"], {}),
        ("held-out images", "data.validation is not set", ["data.validation=null"], {}),
        ("scores", "make fetch-weights", ["evaluation.features=inception", "paths.weights=nowhere"], {}),
        ("disk", "another disk", [], {"checkpoint_bytes": 10**18}),
    ],
)
def test_a_planted_fault_is_found(job: Job, check: str, said: str, overrides: list[str], needs: dict[str, int]) -> None:
    found = checked(job(*overrides), **needs)[check]
    assert found.state == "fails" and said in found.said


@pytest.mark.slow
def test_damaged_bytes_and_missing_latents_are_found(job: Job, world: Any, tmp_path: Path) -> None:
    shutil.copytree(world.path / "latents", tmp_path / "latents")
    tar = sorted((tmp_path / "latents").glob("*.tar"))[0]
    damaged = bytearray(tar.read_bytes())
    damaged[2048:4096] = os.urandom(2048)
    tar.write_bytes(damaged)
    assert checked(job(f"data.latents={tmp_path / 'latents'}"))["data"].state == "fails"
    unfinished = checked(job(f"data.latents={tmp_path / 'to_come'}"))
    assert unfinished["data"].state == unfinished["conditions"].state == "to do"
    assert "96 images in 2 shards" in unfinished["data"].said


@pytest.mark.slow
def test_the_command(world: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = world.tiny_training("name=planned", f"run_dir={tmp_path}/run")[2:]
    assert plan.main([*overrides, "--gpus", "1", "--price", "2", "--json", "--keep"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["would_fail"] is False
    (alone,) = (scale for scale in found["scales"] if scale["step"]["world"] == 1)
    assert alone["price"] == pytest.approx(2 * alone["gpu_hours"])
    assert found["break_even_runs"] == 1.0  # 96 images in the cache, 96 to train on
    forecast = Forecast.of(storage.read_json(tmp_path / "run" / "plan.json"), 1)
    assert forecast is not None and forecast.gpu_hours == alone["gpu_hours"]
    with pytest.raises(SystemExit):
        plan.main(["+experiment=txt2img_laion", "--keep"])
    assert "name=NAME" in capsys.readouterr().err
    assert plan.main([*overrides, "--gpus", "3"]) == 1
    assert "does not divide" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        plan.main([*overrides, "unet.modle_channels=3"])
    assert left.value.code == 2 and "did you mean model_channels" in capsys.readouterr().err
    assert plan.main([*overrides, "--gpus", "1", "data.latents=to_come"]) == 0  # can be made: nothing is wrong
    assert "to do" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_trained_yet_is_planned_and_refused_before_anything_is_built(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The lines of `make compression-sweep` at full scale."""
    untrained = ["+experiment=compression_f8", "name=untrained"]
    assert plan.main(untrained) == 1
    said = capsys.readouterr().out
    assert "395,496,196 trained parameters" in said and "class_label cannot be trained yet" in said
    job = config.compose("train", untrained)
    with pytest.raises(ValueError, match="class_label cannot be trained yet"):
        train.run(job)
    assert not Path(job.run_dir).exists()
