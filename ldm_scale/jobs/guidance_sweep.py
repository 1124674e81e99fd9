"""What guidance buys and what it costs: scores at several strengths, drawn as distance against alignment.

The curve by which text-to-image models are compared (Saharia et al. 2022, figure 4a): FID against CLIP score; in the
toy world, `fd_random` against caption accuracy. `evaluate.py guidances=[...]` draws it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from ldm_scale.core import runtime, storage
from ldm_scale.jobs.scores import GenerationScores
from ldm_scale.latent_diffusion.generate import Generator

_ALIGNMENTS = {"eval/clip_score": "CLIP score", "eval/caption_accuracy": "caption accuracy"}  # the first that there is

Score = Callable[[Generator, str], dict[str, float]]
"""The scores of a generator, and by what name to keep what is done of them."""


@dataclass(frozen=True, slots=True)
class Point:
    """Scores, by name, at one strength of guidance."""

    guidance: float
    scores: dict[str, float]


def run(
    scores: GenerationScores, score: Score, generator: Generator, guidances: Sequence[float], out: Path, title: str
) -> None:
    """Score at each strength, from the same noise; print, and write `out`.json after each and `out`.png. Collective."""
    points: list[Point] = []
    for guidance in guidances:
        guided = replace(generator, sampler=replace(generator.sampler, guidance=guidance))
        points.append(Point(guidance, score(guided, f"guidance{guidance:g}")))
        if runtime.is_main():
            print(f"guidance {guidance:g}: {len(points)} of {len(guidances)}", flush=True)
            plain = [{"guidance": point.guidance, "scores": point.scores} for point in points]
            conditions = {**scores.conditions(generator), "guidance": list(guidances), "weights": title}
            found = {"points": plain, "real": scores.real(), "conditions": conditions}
            storage.write_json(out.with_suffix(".json"), found)
    if runtime.is_main():
        _say(points, title)
        with storage.atomic_write(out.with_suffix(".png")) as file:
            figure = draw(points, scores.real(), f"{title}\n{_told(scores.conditions(generator))}")
            figure.savefig(file, format="png")
        print(f"scores: {out.with_suffix('.json')}\ncurve: {out.with_suffix('.png')}")


def draw(points: Sequence[Point], real: dict[str, float], title: str) -> Figure:
    """Distance against alignment, a marker a strength; dashed, the alignment of real images, where it is known."""
    ranked = sorted(points, key=lambda point: point.guidance)
    aligned, distance = _axes(points[0].scores)
    figure = Figure(figsize=(7, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x, y = ([point.scores[name] for point in ranked] for name in (aligned, distance))
    axes.plot(x, y, marker="o", color="#2a6f97")
    for point in ranked:
        place = point.scores[aligned], point.scores[distance]
        axes.annotate(f"{point.guidance:g}", place, xytext=(6, 6), textcoords="offset points", fontsize=9)
    if (name := f"{aligned}_real") in real:
        axes.axvline(real[name], color="#888888", ls="--", lw=1, label="real images")
        axes.legend(fontsize=8)
    axes.set(xlabel=f"{_ALIGNMENTS[aligned]} (higher is better)", ylabel=f"{_name(distance)} (lower is better)")
    axes.set_title(title, fontsize=9)
    axes.margins(0.12)
    axes.grid(visible=True, alpha=0.3)
    return figure


def _axes(scores: dict[str, float]) -> tuple[str, str]:
    """The score of alignment and the distance that are drawn; `EvaluateJob` makes sure that there are both."""
    return next(name for name in _ALIGNMENTS if name in scores), next(
        name for name in scores if name.startswith(("eval/fid", "eval/fd"))
    )


def _name(score: str) -> str:
    return score.removeprefix("eval/").replace("fid", "FID")


def _told(conditions: dict[str, Any]) -> str:
    return f"{conditions['n']:,} images, {conditions['sampler']} of {conditions['steps']} steps, labels are guidance"


def _say(points: Sequence[Point], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("guidance", justify="right")
    for name in points[0].scores:
        table.add_column(name.removeprefix("eval/"), justify="right")
    for point in points:
        table.add_row(f"{point.guidance:g}", *(f"{value:.4f}" for value in point.scores.values()))
    Console(width=140).print(table)
