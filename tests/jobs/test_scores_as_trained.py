"""What a training says and shows of itself, and what its checkpoint then gives, in the precision that it trains in."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fault_runs import Toy, events
from PIL import Image

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.tensors import to_uint8
from ldm_scale.jobs import config, evaluate, loading
from ldm_scale.latent_diffusion.generate import Generator
from ldm_scale.tracking.grid import labelled_grid

CPU = torch.device("cpu")
HOW = ("evaluation.images=12", "evaluation.batch=4", "sampler.steps=2", "sampler.guidance=3")  # three batches


def evaluated(run: Path, weights: str) -> dict[str, Any]:
    """By the bare command: everything else is the run's own."""
    with pytest.raises(SystemExit, match="0"):
        evaluate.run(config.compose("evaluate", [f"run_dir={run}", f"weights={weights}"]))
    (file,) = run.glob(f"evaluation/{48:012d}_{weights.replace('/', '_')}_????????.json")
    found: dict[str, Any] = storage.read_json(file)
    return found


def prompted(run: Path, weights: str, title: str) -> np.ndarray:
    """The picture of prompt families, drawn anew from the newest checkpoint."""
    source = loading.TrainingRun(RunDir(run), name="latest", which=weights)
    job, trained = config.job_from_plain("train", storage.read_json(run / "config.json")), source.load_as_trained(CPU)
    families = job.evaluation.prompts
    assert list(families) == ["count", "colour", "place", "rare"] and len(families["count"]) == 2
    columns, begin = {guidance: list[torch.Tensor]() for guidance in (1, 3, 7)}, 0
    for captions in families.values():
        for guidance, column in columns.items():
            generator = Generator(
                model=trained.model, first_stage=trained.first_stage, latent_scale=trained.latent_scale,
                sampler=replace(job.sampler, guidance=float(guidance)), size=(32, 32), seed=job.seed,
            )  # fmt: skip
            column.append(to_uint8(generator.images(captions, range(begin, begin + len(captions)))))
        begin += len(captions)
    rows_NGCHW = torch.stack([torch.cat(column) for column in columns.values()], dim=1)
    named = [f"{family}: {caption}" for family, captions in families.items() for caption in captions]
    labels = [label for name in named for label in (name, "guidance 3", "guidance 7")]
    return labelled_grid(rows_NGCHW.flatten(0, 1).permute(0, 2, 3, 1).numpy(), labels, columns=3, title=title)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "world", "tolerance"),
    [
        ("ddp", 2, 1e-9),
        ("zero1", 1, 0),
        pytest.param("zero3", 1, 1e-3, marks=pytest.mark.faults),  # it multiplies by a linear layer of its own
    ],
)
def test_a_checkpoint_has_the_scores_and_pictures_that_its_training_logged(
    engine: str, world: int, tolerance: float, toy: Toy, tmp_path: Path
) -> None:
    weights = {"ema": "ema/32", "ema/8": "ema/8", "raw": "raw"}
    how = [
        "engine.precision=bf16", "seed=3", "ema_half_lives=[32,8]", f"evaluation.weights=[{','.join(weights)}]",
        "every.evaluate=48", f"every.sample={0 if engine == 'zero3' else 48}", "total_images=48", *HOW,
        "evaluation.prompts={count:[a small red circle,a large red circle]}",
    ]  # fmt: skip
    toy.train(tmp_path / "run", *how, engine=engine, world=world).finish()
    inside = {e["weights"]: e for e in events(tmp_path / "run", "evaluation") if e["images_seen"] == 48}
    for which, named in weights.items():
        found = evaluated(tmp_path / "run", which)
        plain = {name.removesuffix(f"_{which.replace('/', '')}"): x for name, x in inside[named]["scores"].items()}
        logged = {name: plain[name] for name in found["scores"]}
        assert found["scores"] == (pytest.approx(logged, rel=tolerance) if tolerance else logged), which
        assert {**found["conditions"], "weights": named}.items() <= inside[named].items()
    if engine == "zero3":
        return
    for name, which, words in (("prompts", "ema", "averaged"), ("prompts_raw", "raw", "raw")):
        with Image.open(tmp_path / "run" / "media" / f"samples__{name}" / f"{48:012d}.png") as picture:
            expected = prompted(tmp_path / "run", which, f"{words} weights after 48 images; guidance 1, then stronger")
            assert (np.asarray(picture) == expected).all(), name
