"""What compression costs and what it buys: quality against images seen, and against sampling throughput.

    python -m ldm_scale.jobs.compression_tradeoff RUN RUN ... [--steps 10 20 50 100 200]

Figures 6 and 7 of Rombach et al. 2022, of runs that differ in the factor f of their first stage. The first is read off
the runs' own scores. For the second each run draws its held-out conditions with each number of sampling steps; what was
measured stays in the run, so that a second call draws only what lacks. Both come out as PNG, in W&B and in report.html
of `runs/compression_tradeoff/NAME`, with whether they have the shape of the paper's, and where not.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.tensors import to_uint8
from ldm_scale.evaluation.alignment import caption_accuracy
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading
from ldm_scale.jobs.model_table import parameters
from ldm_scale.jobs.schemas.experiment import EvaluationConfig, PathsConfig
from ldm_scale.jobs.scores import GenerationScores, HeldOutImages, ReconstructionScores, reconstruct
from ldm_scale.latent_diffusion.generate import UNSTEERED, Generator, Steering
from ldm_scale.samplers.base import Watch
from ldm_scale.tracking.report import write_report
from ldm_scale.tracking.tracker import TrackerConfig

log = runtime.logger(__name__)

STEPS = [10, 20, 50, 100, 200]  # of the paper's figure 7
_SMALL, _MILD, _LARGE = (1, 2), (4, 8, 16), (32,)  # factors that the paper finds slow, best, and limited
_MARKERS, _INK = "ovs^DPX*", "#444444"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A score, and which way it improves."""

    name: str
    words: str
    sign: int
    """1 where more is better, -1 where less is."""


MEASURES = (
    Measure(name="eval/fid", words="FID", sign=-1),
    Measure(name="eval/fid_clean", words="FID, clean resizing", sign=-1),
    Measure(name="eval/fd_random", words="Frechet distance in random features", sign=-1),
    Measure(name="eval/caption_accuracy", words="caption accuracy", sign=1),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Pictures of one run with one number of sampling steps."""

    steps: int
    images_per_s: float
    """Sampling and decoding, of the fastest batch: what else a machine does only slows it."""
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One run of the sweep, and all that is shown of it."""

    factor: int
    """f of its first stage."""
    parameters: int
    """Of its U-Net."""
    curves: dict[str, list[tuple[int, float]]]
    """For each measure, (images seen, score) in training."""
    limits: dict[str, float]
    """Scores of held-out images that the first stage encoded and decoded; none of pixels."""
    drawn: list[Drawn]
    """By number of steps."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a statement of the paper holds here, and by which numbers."""

    holds: bool
    statement: str

    def __str__(self) -> str:
        return f"{'as' if self.holds else 'NOT as'} in the paper: {self.statement}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedGenerator(Generator):
    """Notes how long its batches take."""

    seconds: list[float] = field(default_factory=list)
    """An image, in each batch."""

    def images(
        self,
        conditions: Sequence[Any],
        indices: Sequence[int],
        *,
        steering: Steering = UNSTEERED,
        watch: Watch | None = None,
    ) -> Tensor:
        began = time.perf_counter()
        images_BCHW = Generator.images(self, conditions, indices, steering=steering, watch=watch).cpu()  # waits for it
        self.seconds.append((time.perf_counter() - began) / len(images_BCHW))
        return images_BCHW


def main() -> None:
    """Measure the runs named on the command line, and draw."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.compression_tradeoff")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, each of another factor")
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="numbers of sampling steps")
    asked = parser.parse_args()
    runtime.configure_logging()
    runs = [RunDir(path) for path in asked.runs]
    members = sorted((measure(run, sorted(set(asked.steps))) for run in runs), key=lambda one: one.factor)
    if len({one.factor for one in members}) < len(members):
        raise ValueError(f"factors {[one.factor for one in members]}: give one run of each")
    out = RunDir(runs[0].path.absolute().parents[1] / "compression_tradeoff" / runs[0].path.name)
    publish(members, out, jobs_config.from_plain("tracker", storage.read_json(runs[0].config)["tracker"]))
    _say(members, out)


def measure(run_dir: RunDir, steps: Sequence[int]) -> Member:
    """What there is to know of one run; draws what was not drawn before.

    raises  FileNotFoundError or ValueError where it is no run of a second stage, or has no scores
    """
    source = loading.TrainingRun(run_dir, name="latest", which="ema")
    lines = run_dir.read_metrics()
    curves = {
        one.name: [(line["images_seen"], line[one.name]) for line in lines if line.get(one.name) is not None]
        for one in MEASURES
    }
    if not any(curves.values()):
        raise ValueError(f"{run_dir.metrics} has no scores to compare: train with every.evaluate above 0")
    with torch.device("meta"):
        unet = source.config.unet.build()
    known = _drawn(run_dir, source, steps)
    return Member(
        factor=source.first_stage.factor,
        parameters=parameters(unet),
        curves={name: points for name, points in curves.items() if points},
        limits=known["limits"],
        drawn=[Drawn(steps=count, **known["steps"][str(count)]) for count in steps],
    )


def _drawn(run_dir: RunDir, source: loading.TrainingRun, steps: Sequence[int]) -> dict[str, Any]:
    """Scores and throughput by number of steps, and scores of reconstructions; those that were known are kept."""
    config = storage.read_json(run_dir.config)
    parts = ("evaluation", "paths", "sampler")
    evaluation, paths, sampler = (jobs_config.from_plain(name, config[name]) for name in parts)
    held_out = HeldOutImages.open(source.data, evaluation.images)
    depends_on = {
        "checkpoint": source.checkpoint.name,
        "evaluation": config["evaluation"],
        "sampler": config["sampler"],
        "reference": held_out.digest,
    }
    file = run_dir.path / "evaluation" / "compression_tradeoff.json"
    known = storage.read_json(file) if file.exists() else {}
    if known.get("depends_on") != depends_on:
        known = {"depends_on": depends_on, "steps": {}, "limits": None}
    if known["limits"] is not None and all(str(count) in known["steps"] for count in steps):
        return known
    device = runtime.device()
    trained = source.load(device)
    if known["limits"] is None:
        known["limits"] = (
            _limits(trained.first_stage, evaluation, paths, held_out) if source.first_stage.has_weights else {}
        )
    scores = GenerationScores(evaluation, paths, held_out, device)
    for count in steps:
        if str(count) not in known["steps"]:
            log.info("%s: %d pictures with %d steps", run_dir.path, evaluation.images, count)
            generator = TimedGenerator(
                model=trained.model,
                first_stage=trained.first_stage,
                latent_scale=trained.latent_scale,
                sampler=replace(sampler, steps=count),
                size=(source.size, source.size),
                seed=config["seed"],
            )
            found = scores(generator)
            known["steps"][str(count)] = {"images_per_s": 1 / min(generator.seconds), "scores": found}
            storage.write_json(file, known)
    return known


def _limits(
    first_stage: FirstStage,
    evaluation: EvaluationConfig,
    paths: PathsConfig,
    held_out: HeldOutImages,
) -> dict[str, float]:
    """Scores of held-out images, encoded and decoded."""
    found = ReconstructionScores(replace(evaluation, reference=None), paths, held_out, runtime.device())(
        first_stage
    ).scores
    if evaluation.caption_accuracy:
        batch = held_out.read(range(held_out.count))
        rebuilt = reconstruct(first_stage, batch.images.to(runtime.device())).images
        rebuilt_BHWC = to_uint8(rebuilt).permute(0, 2, 3, 1).cpu().numpy()
        found["eval/caption_accuracy"] = caption_accuracy(batch.captions, rebuilt_BHWC).overall
    return found


def verdicts(members: Sequence[Member]) -> list[Verdict]:
    """The statements of the paper's section 4.1, as far as these runs can bear them out."""
    found = []
    for one in _shared(members):
        found += _slow_and_limited(one, {member.factor: member.curves[one.name] for member in members})
    speed = {member.factor: member.drawn[-1].images_per_s for member in members}
    slowest = min(speed)
    ratios = ", ".join(f"f={factor} {value / speed[slowest]:.1f}x" for factor, value in speed.items())
    rises = all(more > less for less, more in zip(list(speed.values()), list(speed.values())[1:], strict=False))
    found.append(Verdict(rises, f"sampling throughput rises with f (against f={slowest}: {ratios})"))
    return found


def _slow_and_limited(one: Measure, curves: dict[int, list[tuple[int, float]]]) -> list[Verdict]:
    """Small factors are behind half way, the largest one at the end; both against the best of the mild ones."""
    half = min(points[-1][0] for points in curves.values()) / 2
    halfway = {factor: _at(points, half) for factor, points in curves.items()}
    end = {factor: points[-1][1] for factor, points in curves.items()}

    def behind(scores: dict[int, float], factors: Sequence[int], when: str) -> list[Verdict]:
        mild = [factor for factor in _MILD if factor in scores]
        if not mild:
            return []
        best = max(mild, key=lambda factor: one.sign * scores[factor])
        return [
            Verdict(
                one.sign * scores[factor] < one.sign * scores[best],
                f"f={factor} is behind f={best} {when} ({one.words} {scores[factor]:.3g} and {scores[best]:.3g})",
            )
            for factor in factors
            if factor in scores
        ]

    return behind(halfway, _SMALL, "half way through training") + behind(end, _LARGE, "at the end")


def _at(points: Sequence[tuple[int, float]], images: float) -> float:
    """The first score from so many images on."""
    return next(value for seen, value in points if seen >= images)


def publish(members: Sequence[Member], out: RunDir, tracker_config: TrackerConfig) -> None:
    """Draw, and write what W&B and the report show; anew each time, since runs may have come to it."""
    shutil.rmtree(out.wandb, ignore_errors=True)
    images = max(points[-1][0] for member in members for points in member.curves.values())
    caption = "; ".join(map(str, verdicts(members)))
    config = {"experiment": "compression_tradeoff", "name": out.path.name, "factors": [one.factor for one in members]}
    out.path.mkdir(parents=True, exist_ok=True)
    storage.write_json(out.config, config)
    tracker = tracker_config.build(out)
    tracker.start(config)
    tracker.images(images, "compression/quality_by_images", _figure(members, _by_images, "images seen"), caption)
    speed = "images per second, sampling and decoding"
    tracker.images(images, "compression/quality_by_throughput", _figure(members, _by_throughput, speed), caption)
    for member in members:
        for drawn in member.drawn:
            prefix = f"eval/f{member.factor}/steps{drawn.steps}"
            values = {name.removeprefix("eval/"): value for name, value in drawn.scores.items()}
            values["images_per_s"] = drawn.images_per_s
            tracker.log(images, {f"{prefix}/{name}": value for name, value in values.items()})
    for verdict in verdicts(members):
        tracker.event(images, "verdict", holds=verdict.holds, statement=verdict.statement)
    out.write_status("finished", images=images)
    tracker.finish("finished")
    write_report(out)


def _shared(members: Sequence[Member]) -> list[Measure]:
    """Measures that every run has."""
    return [one for one in MEASURES if all(one.name in member.curves for member in members)]


def _figure(members: Sequence[Member], draw: Callable[[Axes, Sequence[Member], Measure], None], x: str) -> np.ndarray:
    """One panel a measure, over what the paper says and whether it holds; uint8 (H, W, 3)."""
    shown, said = _shared(members), verdicts(members)
    figure = Figure(figsize=(7 * len(shown), 5 + 0.2 * len(said)), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, one in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw(axes, members, one)
        axes.set(xlabel=x, title=f"{one.words} ({'higher' if one.sign > 0 else 'lower'} is better)")
        axes.grid(visible=True, alpha=0.3)
    figure.supxlabel("\n".join(map(str, said)), fontsize=9, color=_INK, x=0.01, ha="left")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _colour(members: Sequence[Member], member: Member) -> Any:
    return colormaps["viridis"](0.9 * list(members).index(member) / max(1, len(members) - 1))


def _by_images(axes: Axes, members: Sequence[Member], one: Measure) -> None:
    """Figure 6: a curve a factor; dashed, what its first stage alone makes of the held-out images."""
    for member in members:
        colour = _colour(members, member)
        axes.plot(*zip(*member.curves[one.name], strict=True), marker="o", ms=3, color=colour, label=_label(member))
        if one.name in member.limits:
            axes.axhline(member.limits[one.name], color=colour, ls="--", lw=0.8)
    _scale(axes, one)
    axes.legend(title="dashed: first stage alone" if any(one.name in m.limits for m in members) else None, fontsize=8)


def _by_throughput(axes: Axes, members: Sequence[Member], one: Measure) -> None:
    """Figure 7: a line a factor, a marker a number of steps."""
    for member in members:
        speed = [drawn.images_per_s for drawn in member.drawn]
        score = [drawn.scores[one.name] for drawn in member.drawn]
        axes.plot(speed, score, color=_colour(members, member), lw=1, label=_label(member))
        for place, point in enumerate(zip(speed, score, strict=True)):
            axes.plot(*point, _MARKERS[place % len(_MARKERS)], color=_colour(members, member))
    for place, drawn in enumerate(members[0].drawn):
        axes.plot([], [], _MARKERS[place % len(_MARKERS)], color=_INK, label=f"{drawn.steps} steps")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    _scale(axes, one)
    axes.legend(fontsize=8)


def _scale(axes: Axes, one: Measure) -> None:
    if one.sign < 0:
        axes.set_yscale("log")
    else:
        axes.set_ylim(-0.02, 1.02)


def _label(member: Member) -> str:
    return f"f = {member.factor}, {member.parameters / 1e6:.1f}M"


def _say(members: Sequence[Member], out: RunDir) -> None:
    """The figures in words."""
    most = members[0].drawn[-1].steps
    table = Table(title=f"compression, {most} sampling steps", title_justify="left", box=box.SIMPLE)
    shown = _shared(members)
    for column in ("f", "U-Net", *(one.words for one in shown), "images/s", f"of f={members[0].factor}'s"):
        table.add_column(column, justify="right")
    slowest = members[0].drawn[-1].images_per_s
    for member in members:
        drawn = member.drawn[-1]
        scores = [f"{drawn.scores[one.name]:.4f}" for one in shown]
        ratio = f"{drawn.images_per_s / slowest:.1f}"
        count = f"{member.parameters / 1e6:.2f}M"
        table.add_row(str(member.factor), count, *scores, f"{drawn.images_per_s:.2f}", ratio)
    Console(width=120).print(table)
    print("\n".join(map(str, verdicts(members))))
    print(f"  pictures     {out.media}\n  report       {out.report}")


if __name__ == "__main__":
    jobs_config.or_exit(main)
