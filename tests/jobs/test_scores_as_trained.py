"""What a training says of itself, and what `evaluate.py` says of its checkpoint, in the precision that it trains in."""

from pathlib import Path
from typing import Any

import pytest
from fault_runs import Toy, events

from ldm_scale.core import storage
from ldm_scale.jobs import config, evaluate

HOW = ("evaluation.images=12", "evaluation.batch=4", "sampler.steps=2", "sampler.guidance=3")  # three batches


def evaluated(run: Path, weights: str) -> dict[str, Any]:
    overrides = [f"run_dir={run}", f"weights={weights}", "evaluation.features=random", "evaluation.scores=[frechet]"]
    with pytest.raises(SystemExit, match="0"):
        evaluate.run(config.compose("evaluate", [*overrides, "evaluation.caption_accuracy=true", *HOW]))
    (file,) = run.glob(f"evaluation/*_{weights.replace('/', '_')}.json")
    found: dict[str, Any] = storage.read_json(file)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "tolerance"), [("zero1", 0), ("zero3", 1e-3)])  # zero3 multiplies by its own linear
def test_a_checkpoint_has_the_scores_that_its_training_logged(
    engine: str, tolerance: float, toy: Toy, tmp_path: Path
) -> None:
    weights = {"ema": "ema/32", "ema/8": "ema/8", "raw": "raw"}
    how = [
        "engine.precision=bf16", "ema_half_lives=[32,8]", f"evaluation.weights=[{','.join(weights)}]",
        "every.evaluate=48", "total_images=48", *HOW,
    ]  # fmt: skip
    toy.train(tmp_path / "run", *how, engine=engine, world=1).finish()
    inside = {e["weights"]: e for e in events(tmp_path / "run", "evaluation") if e["images_seen"] == 48}
    for which, named in weights.items():
        found = evaluated(tmp_path / "run", which)
        plain = {name.removesuffix(f"_{which.replace('/', '')}"): x for name, x in inside[named]["scores"].items()}
        logged = {name: plain[name] for name in found["scores"]}
        assert found["scores"] == (pytest.approx(logged, rel=tolerance) if tolerance else logged), which
        assert {**found["conditions"], "weights": named}.items() <= inside[named].items()
