"""Runs every engine that needs a process group, inside one launch; rank 0 writes what happened.

usage  matrix.py OUT CHECKPOINT_OF_ONE_PROCESS STEPS STOP     the second half of a run begins after STOP steps
"""

import json
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny
import torch
import torch.distributed as dist

from ldm_scale.core import runtime

STEPS, STOP = int(sys.argv[3]), int(sys.argv[4])
KINDS = ("ddp", "zero1", "zero2", "zero3")


def curve(kind: str, out: Path) -> dict[str, Any]:
    """The whole curve, its last step watched; then the averages swapped in and out; then a checkpoint."""
    engine = tiny.engine_of(kind)
    training = tiny.Training(engine, out / kind)
    losses = training.run(STEPS - 1)
    last, told, direct = training.watched_step()
    before = training.everything()
    probe = tiny.samples(torch.arange(4))

    def predict() -> float:
        with torch.no_grad():
            return float(engine.model(*probe).sum())

    own = predict()
    with training.ema.swapped(4):
        averaged = predict()
    swap = {"own": own, "averaged": averaged, "restored": predict()}
    after = training.everything()
    training.save()
    if before is not None and after is not None:
        swap["exact"] = all(torch.equal(before[name], after[name]) for name in before)
        safetensors.torch.save_file(before, out / f"{kind}.safetensors")
    found = {"losses": [*losses, last], "norms": training.norms, "swap": swap, "world": engine.world}
    found |= {"told": told, "direct": direct}
    engine.close()
    return found


def rounded(kind: str, out: Path) -> dict[str, Any]:
    """The curve in bfloat16, its last step watched."""
    training = tiny.Training(tiny.engine_of(kind, precision="bf16"), out / "unused")
    losses = training.run(STEPS - 1)
    last, told, direct = training.watched_step()
    training.engine.close()
    return {"losses": [*losses, last], "told": told, "direct": direct}


def resumed(kind: str, out: Path) -> dict[str, Any]:
    """Part of a run, another engine in its place, the rest: bit for bit the whole run."""
    first = tiny.Training(tiny.engine_of(kind), out / f"{kind}-half")
    losses = first.run(STOP)
    path = first.save()
    first.engine.close()
    second = tiny.Training(tiny.engine_of(kind), out / f"{kind}-half")
    second.resume(path)
    losses += second.run(STEPS - STOP)
    everything = second.everything()
    if everything is not None:
        safetensors.torch.save_file(everything, out / f"{kind}-resumed.safetensors")
    second.engine.close()
    return {"losses": losses}


def taken_over(kind: str, checkpoint: Path, out: Path) -> dict[str, Any]:
    """A run of one process goes on here, for its last ten steps."""
    training = tiny.Training(tiny.engine_of(kind), out / f"{kind}-over")
    training.resume(checkpoint)
    losses = training.run(10)
    training.engine.close()
    return {"losses": losses}


def poisoned(kind: str, precision: str, out: Path) -> dict[str, Any]:
    """A step with a gradient that is not finite, on one rank only; and number types (asserted by `prepare`)."""
    engine = tiny.engine_of(kind, precision=precision)
    training = tiny.Training(engine, out / "unused")
    training.run(2)
    before = training.everything()
    for _ in range(engine.accumulation):
        x, y = tiny.samples(torch.arange(engine.micro_batch))
        y[0, 0] = float("inf") if engine.rank == engine.world - 1 else 0.0
        with engine.accumulate():
            engine.backward(engine.model(x, y).mean())
            norm = engine.step(1e-3)
    after = training.everything()
    same = before is not None and after is not None and all(torch.equal(before[n], after[n]) for n in before)
    losses = training.run(1)
    scale = float(engine.module.latent_scale)
    engine.close()
    return {"norm": float(norm), "same": same, "then": losses, "latent_scale": scale}


def apart() -> list[bool]:
    """Whether the ranks' gradients differ after each micro batch of a global batch under ddp."""
    engine, found = tiny.engine_of("ddp"), list[bool]()
    for _ in range(engine.accumulation):
        with engine.accumulate():
            engine.backward(engine.model(*tiny.samples(torch.arange(2) + 100 * engine.rank)).mean())
            mine = engine.module.first.weight.grad
            both = [torch.empty_like(mine) for _ in range(engine.world)]
            dist.all_gather(both, mine)
            found.append(not torch.equal(*both))
            engine.step(1e-3)
    engine.close()
    return found


def main() -> None:
    out, checkpoint = Path(sys.argv[1]), Path(sys.argv[2])
    found: dict[str, Any] = {
        "curve": {kind: curve(kind, out) for kind in KINDS},
        "apart": apart(),
        "rounded": {kind: rounded(kind, out) for kind in KINDS},
        "resumed": {kind: resumed(kind, out) for kind in KINDS},
        "taken_over": {kind: taken_over(kind, checkpoint, out) for kind in KINDS},
        "poisoned": {
            f"{kind}-{precision}": poisoned(kind, precision, out) for kind in KINDS for precision in ("fp32", "bf16")
        },
    }
    if runtime.is_main():
        (out / "found.json").write_text(json.dumps(found))
    runtime.leave()


main()
