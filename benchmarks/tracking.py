"""What tracking costs: the share of a training's time in which it stands still for it, and steps long enough for 0.01.

    python benchmarks/tracking.py

A real training of the toy first stage, with everything on: files, W&B offline, rates, time split, alerts, pictures,
gradients and updates by part, distances of the averages, what the model is given; and as often as there are steps a sum
of losses by timestep, which a first stage has none of. Counted: every call of the tracker between its start and its
end, the readings and marks of the meter, and what is computed to be told. What W&B's own process does meanwhile is
printed apart, in seconds of CPU, as are start and finish, which come once. Scores and sampling are no tracking.

It is trained at its own intervals, lines and pictures alike; then with a line every 10 steps, as the paper's
text-to-image training has them. That draws every 1,000 steps too: five pages of pictures of 256 pixels, laid out,
written and sent. Its steps take longer than these. So what is told in the end is how long steps must be for its lines
and pages to take 0.01 of the time.
"""

import functools
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.core.run_dir import RunDir, State
from ldm_scale.jobs import config, train
from ldm_scale.tracking.grid import labelled_grid
from ldm_scale.tracking.tracker import JsonLines, TrackerConfig
from ldm_scale.tracking.weights_and_biases import Wandb
from ldm_scale.training.checkpoint import Checkpoints
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Engine
from ldm_scale.training.intake import Intake
from ldm_scale.training.movement import Movement
from ldm_scale.training.steps import LossByTimestep
from ldm_scale.training.telemetry import Timeline
from ldm_scale.training.throughput import Meter

LIMIT = 0.01
LOOK_EVERY, SIDE = 1_000, 256  # steps; pixels
ONCE = ("start", "finish")
COUNTED = {
    JsonLines: ("start", "log", "images", "event", "finish"), Meter: ("read", "step"), Timeline: ("mark",),
    Movement: ("watch", "_pulled", "_moved", "numbers"), EMA: ("distances",), LossByTimestep: ("add", "take"),
    Engine: ("mean_over_ranks",), Intake: ("take", "since_last_line"), Checkpoints: ("numbers",),
}  # fmt: skip
COUNTED[Wandb] = COUNTED[JsonLines]

seconds: dict[str, float] = defaultdict(float)
calls: dict[str, int] = defaultdict(int)
cpu: list[float] = []
depth = 0


def timed(owner: type, name: str) -> None:
    """Have every call of a method add to `seconds`; one inside another counts once."""
    method: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*args: Any, **named: Any) -> Any:
        global depth
        began, depth = time.perf_counter(), depth + 1
        try:
            return method(*args, **named)
        finally:
            depth -= 1
            if depth == 0:
                what = f"{owner.__name__}.{name}"
                seconds[what] += time.perf_counter() - began
                calls[what] += 1

    setattr(owner, name, wrapper)


def cpu_of_children() -> float:
    """CPU seconds of this process's children that are alive: W&B's."""
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(one.user + one.system for one in times)


def look() -> tuple[int, float]:
    """How many pages one look of `txt2img_laion` has, and the seconds they take."""
    job = config.compose("train", ["+experiment=txt2img_laion", "name=look", "data.latents=x", "data.validation=x"])
    prompts, grid = sum(map(len, job.prompts.values())), job.evaluation.grid
    pages = {"prompts": (3 * prompts, 3), "prompts_raw": (3 * prompts, 3), "grid": (grid, 4), "progressive": (24, 6)}
    draw = np.random.default_rng(0)
    pictures_BHWC = np.stack([photograph(draw) for _ in range(max(count for count, _ in pages.values()))])
    tracker = TrackerConfig().build(RunDir(Path("look")))
    tracker.start({})
    began = time.perf_counter()
    for name, (count, columns) in {**pages, "eaten": (16, 4)}.items():
        page = labelled_grid(pictures_BHWC[:count], ["a caption of some words"] * count, columns=columns)
        tracker.images(0, f"samples/{name}", page, "a caption")
    spent = time.perf_counter() - began
    tracker.finish("stopped")
    return len(pages) + 1, spent


def photograph(draw: np.random.Generator) -> np.ndarray:
    """Soft shapes and the noise of a sensor, uint8 (H, W, 3)."""
    shapes = Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((SIDE, SIDE))
    return (np.asarray(shapes) + draw.normal(0, 3, (SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)


def training(name: str, *overrides: str) -> tuple[float, float]:
    """Train; returns the seconds of a step, and those of them that tracking took. Prints what took them."""
    for counted in (seconds, calls, cpu):
        counted.clear()
    job = config.compose(
        "train",
        [
            "+experiment=autoencoder_kl_f4", "scale=toy", f"name={name}", "data.images=toy/train",
            "data.validation=toy/val", "every.evaluate=0", "evaluation.images=32", *overrides,
        ],
    )  # fmt: skip
    train.run(job)
    steps = job.total_images // job.global_batch
    by_timestep, t_B = LossByTimestep(1_000, torch.device("cpu")), torch.arange(job.global_batch)
    for _ in range(steps):
        by_timestep.add(t_B, t_B.float())
    told = sorted(seconds.items(), key=lambda item: -item[1])
    lines = RunDir(Path(job.run_dir)).read_metrics()
    step_s = fmean(line["perf/step_ms"] for line in lines if "perf/step_ms" in line) / 1e3
    held_s = sum(spent for what, spent in told if not what.endswith(ONCE)) / steps
    for what, spent in told:
        print(f"{what:18} {calls[what]:6} calls  {1e3 * spent / calls[what]:9.3f} ms each")
    print(f"W&B's process      {cpu[0]:.2f} s of CPU")
    return step_s, held_s


def main() -> None:
    """Print a line for each call, and the shares."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
    for owner, names in COUNTED.items():
        for name in names:
            timed(owner, name)
    finish = Wandb.finish

    def finish_noted(self: Wandb, state: State) -> None:
        cpu.append(cpu_of_children())
        finish(self, state)

    Wandb.finish = finish_noted  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as where:
        os.chdir(where)
        write_world(Path("toy"), Recipe(train=256, val=32, objects=1, size=32, shard_size=64, seed=0))
        print(f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}")
        own_step_s, own_s = training("own")
        often_step_s, often_s = training("often", "every.log=160", "every.sample=0", "total_images=6_400")
        pages, look_s = look()
    own, often = own_s / own_step_s, often_s / often_step_s
    print(f"at its own intervals     {own:.4f} of the time, with pictures; steps of {1e3 * own_step_s:.1f} ms")
    print(f"a line every 10 steps    {often:.4f} of the time; steps of {1e3 * often_step_s:.1f} ms")
    print(f"a look at 256 pixels     {look_s:.2f} s for {pages} pages, every {LOOK_EVERY:,} steps")
    enough_s = (often_s + look_s / LOOK_EVERY) / LIMIT
    print(f"such lines and looks     {LIMIT:g} of the time at steps of {1e3 * enough_s:.0f} ms, less at longer ones")


if __name__ == "__main__":
    main()
