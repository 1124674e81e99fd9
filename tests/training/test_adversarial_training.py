"""A first stage and its discriminator in training: gradients against plain autograd, one and two processes, resumes."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import adversarial
import pytest
import torch
from torch import Tensor, nn

from ldm_scale.first_stage.adversarial import AdversarialConfig, AdversarialKind, DiscriminatorNorm, generator_loss
from ldm_scale.training.adversary import DISCRIMINATOR
from ldm_scale.training.checkpoint_files import read_consolidated

TOLERANCE = 1e-4  # relative, of every number of the curve in float32
ROUNDED = 0.3  # the same of gradients in bfloat16: CPUs round 0.10 apart; sums for means would be a factor of 2
NUMBERS = {
    f"train/{name}"
    for name in (
        "loss", "l1", "perceptual", "kl", "logvar", "grad_norm", "adversarial", "adversarial_weight", "discriminator",
        "logits_originals", "logits_rebuilt", "discriminator_grad_norm", "variance_grad_norm",
    )
}  # fmt: skip


@pytest.fixture
def training(tmp_path: Path) -> Iterator[adversarial.Training]:
    found = adversarial.Training("one_process", tmp_path)
    yield found
    found.engine.close()


def assert_gradients(module: nn.Module, expected: Sequence[Tensor]) -> None:
    for gradient, (name, parameter) in zip(expected, module.named_parameters(), strict=True):
        assert parameter.grad is not None, name
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, name


@pytest.mark.parametrize(
    ("kind", "norm"),
    [
        (AdversarialKind.hinge, DiscriminatorNorm.group),
        (AdversarialKind.vanilla, DiscriminatorNorm.group),
        (AdversarialKind.hinge, DiscriminatorNorm.batch),
    ],
)
def test_gradients_are_those_of_plain_autograd_each_for_its_own(
    kind: AdversarialKind, norm: DiscriminatorNorm, tmp_path: Path
) -> None:
    """Oracle: the terms as they are written, every gradient by itself, through networks whose others are frozen."""
    config = dataclasses.replace(adversarial.ADVERSARIAL, kind=kind, norm=norm, start_images=0)
    training = adversarial.Training("one_process", tmp_path, adversarial=config)
    engine, adversary = training.engine, training.adversary
    assert adversary is not None
    first_stage, judge = engine.module, engine.companions[DISCRIMINATOR].module
    images_BCHW = adversarial.images(torch.arange(4, device=engine.device))
    noise_BCHW = torch.randn(4, 2, 8, 8, device=engine.device)

    def nll(rebuilt_BCHW: Tensor) -> Tensor:
        return (images_BCHW - rebuilt_BCHW).abs().sum((1, 2, 3)).mean()

    rebuilt_BCHW = engine.model(images_BCHW, noise_BCHW).images
    with engine.accumulate():
        term, told = adversary(images_BCHW, rebuilt_BCHW, nll(rebuilt_BCHW))
        assert all(parameter.grad is None for parameter in first_stage.parameters())
        found = {name: parameter.grad.clone() for name, parameter in judge.named_parameters()}
        engine.backward(nll(rebuilt_BCHW) + term)
    assert all(torch.equal(found[name], parameter.grad) for name, parameter in judge.named_parameters())

    last = first_stage.decoder.conv_out.weight
    plain_BCHW = first_stage(images_BCHW, noise_BCHW).images
    fooling = generator_loss(judge(plain_BCHW)).mean()
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll(plain_BCHW), fooling)]
    weight = 0.5 * (norms[0] / (norms[1] + 1e-4)).item()
    assert told["train/adversarial_weight"].item() == pytest.approx(weight, rel=1e-4)
    assert term.item() == pytest.approx(weight * fooling.item(), rel=1e-4)
    of_first_stage = torch.autograd.grad(nll(plain_BCHW) + weight * fooling, list(first_stage.parameters()))
    assert_gradients(first_stage, of_first_stage)
    a, b = judge(images_BCHW), judge(plain_BCHW.detach())
    if kind is AdversarialKind.hinge:
        telling = 0.5 * ((1 - a).clamp(min=0).mean() + (1 + b).clamp(min=0).mean())
    else:
        telling = 0.5 * ((1 + (-a).exp()).log().mean() + (1 + b.exp()).log().mean())
    assert told["train/discriminator"].item() == pytest.approx(telling.item(), rel=1e-5)
    assert_gradients(judge, torch.autograd.grad(telling, list(judge.parameters())))
    engine.close()


def test_the_discriminator_waits_for_its_turn(training: adversarial.Training) -> None:
    def judge() -> dict[str, Tensor]:
        return {name: tensor for name, tensor in training.everything().items() if DISCRIMINATOR in name}

    fresh = judge()
    early = training.run(adversarial.START // adversarial.GLOBAL_BATCH)
    assert all("train/discriminator" not in numbers for numbers in early)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in judge().items())
    (late,) = training.run(1)
    assert late.keys() == NUMBERS
    assert training.engine.companion_masters[DISCRIMINATOR].step == 1
    still = {name for name, tensor in judge().items() if torch.equal(fresh[name], tensor)}
    assert all(name.endswith("main.8.bias") for name in still)  # of logits within the hinges' margins: pulled both ways


def test_it_learns_to_tell_them_apart_and_the_variance_to_be_the_errors(training: adversarial.Training) -> None:
    numbers = training.run(40)
    assert numbers[-1]["train/logits_originals"] > numbers[-1]["train/logits_rebuilt"]
    first = numbers[adversarial.START // adversarial.GLOBAL_BATCH]
    assert numbers[-1]["train/discriminator"] < first["train/discriminator"]
    assert numbers[-1]["train/logvar"] < -0.05


def test_errors_of_a_vq_first_stage_are_means_and_its_discriminator_weighs_as_much_less(tmp_path: Path) -> None:
    """The reductions of the reference: a KL first stage sums 3 x 16 x 16 values, and so does its adaptive weight."""
    late = adversarial.START // adversarial.GLOBAL_BATCH
    weights = []
    for first_stage in (adversarial.KL, adversarial.VQ):
        training = adversarial.Training("one_process", tmp_path / type(first_stage).__name__, first_stage=first_stage)
        numbers = training.run(late + 4)
        weights.append(torch.tensor([one["train/adversarial_weight"] for one in numbers[late:]]).log().mean().exp())
        training.engine.close()
    assert all(torch.tensor(list(one.values())).isfinite().all() for one in numbers)
    assert numbers[-1]["train/codebook"] > 0
    assert 1 / 3 < weights[0] / weights[1] / (3 * adversarial.SIDE**2) < 3


def test_where_one_network_s_gradients_are_not_finite_none_moves(training: adversarial.Training) -> None:
    training.run(3)
    before, adam_steps = training.everything(), training.engine.companion_masters[DISCRIMINATOR].step
    discriminator = training.engine.companions[DISCRIMINATOR]
    real = discriminator.backward

    def spoiled(loss: Tensor) -> None:
        real(loss)
        discriminator.module.main[0].bias.grad.fill_(torch.inf)

    discriminator.backward = spoiled  # type: ignore[method-assign]
    (numbers,) = training.run(1)
    assert numbers["train/grad_norm"] != numbers["train/grad_norm"] or numbers["train/grad_norm"] == torch.inf
    now = training.everything()
    assert [name for name in now if "ema" not in name and not torch.equal(before[name], now[name])] == []
    assert training.engine.companion_masters[DISCRIMINATOR].step == adam_steps


def test_nothing_beside_the_first_stage_is_averaged_or_exported(training: adversarial.Training) -> None:
    training.run(3)
    names = dict(training.engine.module.named_parameters()).keys()
    assert training.ema.consolidated(16).keys() == names  # type: ignore[union-attr]
    path = training.save()
    assert read_consolidated(path)[1].keys() == read_consolidated(path, "ema/16")[1].keys() == names


def test_a_checkpoint_without_a_discriminator_lets_it_start_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    none = AdversarialConfig(kind=AdversarialKind.none)
    before = adversarial.Training("one_process", tmp_path, adversarial=none)
    before.run(2)
    path = before.save()
    before.engine.close()
    training = adversarial.Training("one_process", tmp_path)
    training.resume(path)
    assert "holds no discriminator: it starts anew" in caplog.text
    assert training.run(1)[0].keys() == NUMBERS
    training.engine.close()


def test_a_discriminator_of_another_shape_is_refused(training: adversarial.Training, tmp_path: Path) -> None:
    path = training.save()
    wider = dataclasses.replace(adversarial.ADVERSARIAL, channels=16)
    other = adversarial.Training("one_process", tmp_path, adversarial=wider)
    with pytest.raises(ValueError, match=r"discriminator.*another architecture"):
        other.resume(path)
    other.engine.close()


def test_in_bfloat16_the_weight_stays_close(tmp_path: Path) -> None:
    curves = []
    for precision in ("fp32", "bf16"):
        training = adversarial.Training("one_process", tmp_path / precision, precision=precision)
        curves.append([numbers.get("train/adversarial_weight", 0.0) for numbers in training.run(5)])
        training.engine.close()
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=ROUNDED)


@pytest.fixture(scope="module")
def on_two(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("adversarial")
    return out, launched(launch, out, "plain", "accumulated", "bf16", "vq")


def launched(launch: Any, out: Path, *names: str) -> Any:
    done = launch("adversarial.py", str(out), *names)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "found.json").read_text())


def assert_like_one(name: str, found: Any, path: Path) -> None:
    """The numbers of a run on two processes are those of one whose micro batches are twice as large."""
    alone = adversarial.Training("one_process", path, **adversarial.RUNS[name])
    for ours, theirs in zip(found[name]["numbers"], alone.run(adversarial.STEPS), strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-6)
    alone.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "accumulated", "vq"])
def test_two_processes_train_like_one(name: str, on_two: tuple[Path, Any], tmp_path: Path) -> None:
    """The weight of the adversarial term too: it is one of the forward passes of all ranks. And what starts again."""
    assert_like_one(name, on_two[1], tmp_path)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="batch norms over several processes need as many GPUs")
def test_on_two_gpus_batch_norms_see_the_images_of_both(launch: Any, tmp_path: Path) -> None:
    assert_like_one("batch", launched(launch, tmp_path, "batch"), tmp_path)


@pytest.mark.slow
def test_two_processes_in_bfloat16_stay_close_to_one(on_two: tuple[Path, Any], tmp_path: Path) -> None:
    """The reconstruction all along; the discriminator's game in its first three steps, before it amplifies rounding."""
    alone = adversarial.Training("one_process", tmp_path, precision="bf16")
    ours, theirs = on_two[1]["bf16"]["numbers"], alone.run(adversarial.STEPS)
    alone.engine.close()
    assert [step["train/l1"] for step in ours] == pytest.approx([step["train/l1"] for step in theirs], rel=0.05)
    for mine, other in zip(ours[2:5], theirs[2:5], strict=True):
        for name in ("train/adversarial_weight", "train/discriminator", "train/grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=ROUNDED), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "accumulated", "bf16", "vq"])
def test_resumes_before_and_after_its_turn_are_the_same_run_bit_for_bit(name: str, on_two: tuple[Path, Any]) -> None:
    found = on_two[1][name]
    assert found["again"] == found["numbers"]
    assert found["changed"] == []


@pytest.mark.slow
def test_beside_a_discriminator_dead_entries_of_a_codebook_start_again(on_two: tuple[Path, Any]) -> None:
    used = [step.get("train/codebook_usage", 0.0) for step in on_two[1]["vq"]["numbers"]]
    assert 0 < used[2] < used[-1]


@pytest.mark.slow
def test_one_process_goes_on_from_two(on_two: tuple[Path, Any], tmp_path: Path) -> None:
    out, found = on_two
    training = adversarial.Training("one_process", tmp_path)
    done = 1 + adversarial.STEPS // 2
    training.resume(out / "plain_broken_off" / f"images_{done * adversarial.GLOBAL_BATCH:012d}")
    assert training.engine.companion_masters[DISCRIMINATOR].step == done - 2
    for ours, theirs in zip(training.run(adversarial.STEPS - done), found["plain"]["numbers"][done:], strict=True):
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=1e-6)
    training.engine.close()


@pytest.mark.slow
def test_an_image_that_is_no_number_moves_nothing_on_any_rank(on_two: tuple[Path, Any]) -> None:
    assert on_two[1]["moved"] is False


def test_batch_norms_over_several_processes_need_gpus(training: adversarial.Training) -> None:
    batch = dataclasses.replace(adversarial.ADVERSARIAL, norm=DiscriminatorNorm.batch).build(3)
    training.engine.world = 2
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"2 processes can share on GPUs only.*choose norm=group"):
            training.engine.accompany("judge", batch, adversarial.OptimizerConfig())
    training.engine.world = 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can be waited for")
@pytest.mark.parametrize("norm", DiscriminatorNorm)
def test_no_step_of_any_of_them_waits_for_the_device(norm: DiscriminatorNorm, tmp_path: Path) -> None:
    """Nor does the end of a window of the codebook."""
    config = dataclasses.replace(adversarial.ADVERSARIAL, norm=norm)
    training = adversarial.Training("one_process", tmp_path, adversarial=config, first_stage=adversarial.VQ)
    training.run(adversarial.STEPS)  # the first few allocate
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(adversarial.WINDOW // adversarial.GLOBAL_BATCH):
        training.global_batch()
    torch.cuda.set_sync_debug_mode("default")
    training.engine.close()
