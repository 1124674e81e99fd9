import copy
import json
import logging
import os

import pytest
import safetensors.torch
import tiny
import torch
from torch import nn

from ldm_scale.training import engine as engines
from ldm_scale.training.engine import DTYPES, EngineConfig, EngineKind, Precision
from ldm_scale.training.optimizer import OptimizerConfig

KINDS = ["ddp", "zero1", "zero2", "zero3"]
BF16_TOLERANCE = 5e-3  # relative, of every loss of the curve


@pytest.fixture
def one_process():
    engine = tiny.engine_of("one_process")
    yield engine
    engine.close()


def test_one_process_equals_a_bare_torch_loop(tmp_path):
    """Oracle: global batches in one forward, clip_grad_norm_, unfused AdamW."""
    training = tiny.Training(tiny.engine_of("one_process", decay="all"), tmp_path)
    model, config = tiny.tiny(), OptimizerConfig(learning_rate=3e-3, warmup_images=32)
    adam = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=False, foreach=False)
    losses, norms = [], []
    for step in range(10):
        loss = model(*tiny.samples(torch.arange(step * 8, step * 8 + 8))).mean()
        adam.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        adam.param_groups[0]["lr"] = config.learning_rate_at(step * 8, 0)
        adam.step()
        losses.append(loss.item())
    assert training.run(10) == pytest.approx(losses, rel=1e-5)
    assert training.norms == pytest.approx(norms, rel=1e-5)


def test_steps_happen_at_boundaries_only(one_process):
    start = copy.deepcopy(one_process.module.state_dict())
    for micro in range(one_process.accumulation):
        with one_process.accumulate():
            one_process.backward(one_process.model(*tiny.samples(torch.arange(2))).mean())
            norm = one_process.step(1e-3)
        last = micro == one_process.accumulation - 1
        assert one_process.at_boundary == last
        assert norm.isfinite() == last
        moved = any(not torch.equal(start[name], now) for name, now in one_process.module.state_dict().items())
        assert moved == last
    assert all(parameter.grad is None for parameter in one_process.module.parameters())


def test_bf16_keeps_float32_weights_in_one_process():
    engine = tiny.engine_of("one_process", precision="bf16")
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    loss = engine.model(*tiny.samples(torch.arange(2))).mean()
    exact = tiny.tiny()(*tiny.samples(torch.arange(2))).mean()
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)


def test_every_engine_has_its_number_types():
    assert set(DTYPES) == {(kind, precision) for kind in EngineKind for precision in Precision}
    for dtypes in DTYPES.values():
        assert {dtypes.master, dtypes.ema, dtypes.accumulation, dtypes.reduction, dtypes.norm} == {torch.float32}


def test_number_types_are_compared_with_live_tensors():
    engine = EngineConfig(kind=EngineKind.one_process, precision=Precision.fp32).build(global_batch=8, micro_batch=2)
    engine.dtypes = DTYPES[EngineKind.zero1, Precision.bf16]
    with pytest.raises(AssertionError, match="obtained"):
        engine.prepare(tiny.tiny(), OptimizerConfig())


def test_a_module_that_is_not_float32_is_refused():
    engine = EngineConfig(kind=EngineKind.one_process, precision=Precision.bf16).build(global_batch=8, micro_batch=2)
    with pytest.raises(ValueError, match=r"conv\.weight torch\.bfloat16"):
        engine.prepare(tiny.tiny().bfloat16(), OptimizerConfig())


def test_statistics_in_bfloat16_would_be_noticed():
    class Rough(nn.Module):
        """What layer_norm would do if it summed in bfloat16."""

    probe = engines._Autocast(Rough(), "cpu", torch.bfloat16)
    real = nn.functional.layer_norm

    def rough(x, shape, weight, bias, eps):
        mean = torch.zeros(1, dtype=x.dtype)
        for value in x.flatten():
            mean = mean + value
        return (x - mean / x.numel()) / (x - mean / x.numel()).std()

    try:
        nn.functional.layer_norm = rough
        assert probe.measured(torch.bfloat16, torch.device("cpu"))[1] is torch.bfloat16
    finally:
        nn.functional.layer_norm = real
    assert probe.measured(torch.bfloat16, torch.device("cpu")) == (torch.bfloat16, torch.float32)


def test_frozen_parameters_are_refused_by_name():
    engine = EngineConfig(kind=EngineKind.one_process, precision=Precision.fp32).build(global_batch=8, micro_batch=2)
    model = tiny.tiny()
    model.first.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"first\.bias.*frozen networks outside"):
        engine.prepare(model, OptimizerConfig())


def test_one_process_refuses_a_launch_of_many(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="accelerate launch --multi_gpu --num_processes 4"):
        EngineConfig(kind=EngineKind.one_process).build(global_batch=8, micro_batch=2)


def test_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="global_batch 6, 12"):
        EngineConfig(kind=EngineKind.ddp).build(global_batch=8, micro_batch=2)


def test_zero_refuses_what_would_drop_deepspeed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_CPU"):
        EngineConfig(kind=EngineKind.zero1).build(global_batch=8, micro_batch=2)


def test_settings_of_a_foreign_config_file_are_dropped_and_named(monkeypatch, caplog, tmp_path):
    file = tmp_path / "default_config.yaml"
    file.write_text("mixed_precision: fp16\n")
    monkeypatch.setattr(engines, "default_config_file", str(file))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "7")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    with caplog.at_level(logging.WARNING):
        engine = tiny.engine_of("one_process")
    assert engine.accumulation == engine._accelerator.gradient_accumulation_steps == 4
    assert "ACCELERATE_MIXED_PRECISION" not in os.environ
    assert str(file) in caplog.text
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=7, ACCELERATE_MIXED_PRECISION=fp16" in caplog.text
    assert "DYNAMO" not in caplog.text
    engine.close()


@pytest.mark.parametrize("clip", [-1.0, float("inf"), float("nan")])
def test_impossible_clip_is_refused(clip):
    with pytest.raises(ValueError, match=r"engine\.grad_clip"):
        EngineConfig(grad_clip=clip)


def test_mean_over_ranks_of_one(one_process):
    assert one_process.mean_over_ranks({"a": torch.tensor(2.0), "b": torch.tensor(3)}) == {"a": 2.0, "b": 3.0}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_like_one(kind, two_processes, reference):
    out, found = two_processes
    curve = found["curve"][kind]
    assert curve["world"] == 2
    assert curve["losses"] == pytest.approx(reference["losses"], rel=1e-4)
    assert curve["norms"] == pytest.approx(reference["norms"], rel=1e-4)
    whole = safetensors.torch.load_file(out / f"{kind}.safetensors")
    assert whole.keys() == reference["everything"].keys()
    for name, expected in reference["everything"].items():
        error = (whole[name] - expected).norm() / expected.norm()
        assert error < (1e-6 if name.startswith("ema/") else 1e-5), (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_like_one_in_bfloat16(kind, two_processes, reference):
    """Under ZeRO norms and biases are bfloat16 too, and so is each micro batch's gradient before it is summed."""
    _, found = two_processes
    rounded = found["rounded"][kind]["losses"]
    assert rounded == pytest.approx(reference["rounded"], rel=BF16_TOLERANCE)
    assert rounded != pytest.approx(reference["losses"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resume_on_two_processes_is_the_same_run_bit_for_bit(kind, two_processes):
    out, found = two_processes
    assert found["resumed"][kind]["losses"] == found["curve"][kind]["losses"]
    whole, halves = (safetensors.torch.load_file(out / f"{kind}{end}.safetensors") for end in ("", "-resumed"))
    assert whole.keys() == halves.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, halves[name]), (name, f"stopped after {found['stop']} steps")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [f"{kind}-{precision}" for kind in KINDS for precision in ("fp32", "bf16")])
def test_a_gradient_that_is_not_finite_moves_nothing_on_any_rank(kind, two_processes):
    _, found = two_processes
    poisoned = found["poisoned"][kind]
    assert not torch.tensor(poisoned["norm"]).isfinite()
    assert poisoned["same"]
    assert torch.tensor(poisoned["then"]).isfinite().all()


@pytest.mark.slow
def test_ddp_reduces_gradients_at_boundaries_only(two_processes):
    _, found = two_processes
    assert found["apart"] == [True, False]


@pytest.mark.slow
def test_compiled_blocks_train_like_others_under_the_same_names(launch, tmp_path):
    """One graph serves equal blocks, one of them recomputed, on all engines; nothing is compiled without gradients."""
    done = launch("compiled.py", str(tmp_path), "ddp", "zero1", "zero2")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "compiled.json").read_text())
    eager = found.pop("eager")
    assert [eager["graphs"], *(one["graphs"] for one in found.values())] == [0, 1, 0, 0]
    for one in found.values():
        assert one["losses"] == pytest.approx(eager["losses"], rel=1e-5)
        assert one["names"] == eager["names"]
        assert one["graphs_without_gradients"] == 0


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match=r"engine\.compile=true with engine\.kind=zero3.*Choose zero2"):
        EngineConfig(kind=EngineKind.zero3, compile=True)
    config = EngineConfig(kind=EngineKind.one_process, precision=Precision.fp32, compile=True)
    with pytest.raises(ValueError, match="none of the blocks"):
        config.build(global_batch=8, micro_batch=2).prepare(tiny.tiny(), OptimizerConfig())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_keep_their_precision(kind, two_processes):
    _, found = two_processes
    assert found["poisoned"][f"{kind}-bf16"]["latent_scale"] == float(torch.tensor(tiny.LATENT_SCALE))


@pytest.mark.slow
def test_every_engine_runs_alone_without_a_launcher(launch):
    done = launch("alone.py", processes=0)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[-2] == "ddp zero1 zero2 zero3"


@pytest.mark.slow
def test_a_launch_of_two_refuses_one_process(launch, tmp_path):
    done = launch("refused.py")
    assert done.returncode != 0
    assert "engine.kind=one_process, but 2 processes were started" in done.stderr
