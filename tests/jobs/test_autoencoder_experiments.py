"""Every first stage of the paper trains at toy scale, by the parts that train.py gives to the loop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from data_tools import make_openmoji
from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.data.loader import Loader
from ldm_scale.first_stage.vq import AutoencoderVQ
from ldm_scale.jobs import config
from ldm_scale.jobs.kept import Kept
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.stages import AutoencoderStage
from ldm_scale.training.ema import EMA

EXPERIMENTS = sorted(file.stem for file in (config.CONF / "experiment").glob("autoencoder_*.yaml"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, Recipe(train=128, val=24, objects=1, size=32, shard_size=64, seed=0))
    return folder


class Training:
    """Some steps of an experiment, and what they found."""

    def __init__(self, experiment: str, world: Path, steps: int, *overrides: str) -> None:
        job: TrainJob = config.compose(
            "train",
            [
                f"+experiment={experiment}", "scale=toy", f"data.images={world}/train", f"data.validation={world}/val",
                "optimizer.warmup_images=0", "evaluation.images=24", "evaluation.batch=8", *overrides,
            ],
        )  # fmt: skip
        engine = job.engine.build(global_batch=job.global_batch, micro_batch=job.micro_batch)
        torch.manual_seed(job.seed)
        self.stage = AutoencoderStage(job, engine.device, lambda key, reason, position: None)
        self.stage.prepare(engine, job.optimizer)
        self.start = {name: tensor.clone() for name, tensor in self.stage.module.state_dict().items()}
        step = self.stage.step(engine, EMA(engine.masters, job.ema_half_lives))
        self.found: dict[str, float] = {}
        loader = Loader(self.stage.source, global_batch=job.global_batch, micro_batch=job.micro_batch)
        with loader:
            for number, batch in zip(range(steps * engine.accumulation), loader.batches(0), strict=False):
                seen = number // engine.accumulation * job.global_batch
                metrics = step(batch, job.optimizer.learning_rate_at(seen, job.total_images), seen)
        self.found = engine.mean_over_ranks(metrics)
        engine.close()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_first_stage_trains_at_toy_scale(experiment: str, world: Path) -> None:
    training = Training(experiment, world, 1, "global_batch=4", "micro_batch=2")
    found, module = training.found, training.stage.module
    assert all(map(math.isfinite, found.values()))
    assert ("train/codebook" in found) == isinstance(module, AutoencoderVQ)
    assert ("train/kl" in found) != ("train/codebook" in found)
    still = [name for name, tensor in module.state_dict().items() if torch.equal(tensor, training.start[name])]
    assert [name for name in still if not name.endswith("to_k.bias")] == []  # softmax sees no shift of all its inputs


class Operations(TorchDispatchMode):
    """Counts those of every product, forward and backward; torch's own counter does not stand autograd.grad."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("kind", ["none", "hinge"])
def test_operations_are_counted_as_a_step_does_them(kind: str, world: Path) -> None:
    """Of the autoencoder, the perceptual network and the discriminator, but for gradients of the pixels themselves."""
    judged = ["autoencoder_loss.perceptual=random", f"autoencoder_loss.adversarial.kind={kind}"]
    sizes = ["first_stage.channels=8", "autoencoder_loss.adversarial.start_images=0", "global_batch=4", "micro_batch=4"]
    with Operations() as counted:
        training = Training("autoencoder_kl_f4", world, 1, *judged, *sizes)
    assert training.stage.flops_per_image() == pytest.approx(counted.total / 4, rel=0.02)


@pytest.mark.slow
def test_restarts_bring_most_of_the_codebook_into_use(world: Path, tmp_path: Path) -> None:
    """Held-out use after 48 steps, with dead entries started again and without."""
    quick = ["first_stage.channels=8", "autoencoder_loss.codebook_window=192", "optimizer.schedule=constant"]
    restarted, left = (
        Training("autoencoder_vq_f4", world, 48, f"autoencoder_loss.restart_codes={restart}", *quick).stage.evaluate(
            lambda: None, Kept(tmp_path / str(restart), {})
        )
        for restart in (True, False)
    )
    assert restarted["eval/codebook_usage"] >= 0.5
    assert restarted["eval/codebook_usage"] > 2 * left["eval/codebook_usage"]
    assert restarted["eval/codebook_perplexity"] > 2 * left["eval/codebook_perplexity"]


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_against_a_discriminator_it_is_sharper_than_by_absolute_error_alone_for_less_than_1_5_db(
    kind: str, tmp_path: Path
) -> None:
    """On held-out drawings, as docs/first_stages.md says; half as long."""
    make_openmoji.main([str(tmp_path / "openmoji"), "--size", "32"])
    adversarial = "autoencoder_loss.adversarial."
    against = [f"{adversarial}{one}" for one in ("kind=hinge", "weight=0.25", "norm=batch", "channels=32")]
    length = ["total_images=4096", "evaluation.images=256", f"{adversarial}start_images=1024"]
    alone, judged = (
        Training(f"autoencoder_{kind}_f4", tmp_path / "openmoji", 256, *length, *more).stage.evaluate(
            lambda: None, Kept(tmp_path / str(len(more)), {})
        )
        for more in ([], against)
    )
    assert 1.2 * alone["eval/detail"] < judged["eval/detail"] < 1
    assert judged["eval/psnr"] > alone["eval/psnr"] - 1.5
