"""What a run reached and where it left things, in words: printed when training ends, and by
`python -m ldm_scale.jobs.summary RUN [RUN ...]`.
"""

import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.weights_and_biases import closing_hint

_SCORES = {
    "eval/caption_accuracy": ("caption accuracy (colour, shape and position right)", "{:.3f}"),
    "eval/fd_random": ("Frechet distance, random features (fd_random)", "{:.4f}"),
    "eval/fid": ("Frechet inception distance (FID)", "{:.2f}"),
    "eval/psnr": ("reconstruction PSNR, dB", "{:.2f}"),
    "eval/ssim": ("reconstruction SSIM", "{:.4f}"),
    "eval/detail": ("fine detail, share of the originals'", "{:.3f}"),
    "val/loss": ("validation loss", "{:.4f}"),
}


def closing(*run_dirs: RunDir) -> None:
    """Print, for each run, its scores at the start and at the end, its files, and what to type next."""
    console = Console(width=min(Console().width, 120) if Console().is_terminal else 120)
    for run_dir in run_dirs:
        config, status = storage.read_json(run_dir.config), storage.read_json(run_dir.status)
        console.print(_scores(run_dir, config, status))
        files = _files(run_dir, trains_first_stage=config["unet"] is None, told=config["conditioning"] is not None)
        console.print(files, highlight=False, markup=False, soft_wrap=True)


def _scores(run_dir: RunDir, config: dict[str, Any], status: dict[str, Any]) -> Table:
    lines = run_dir.read_metrics()
    table = Table(
        title=f"{config['experiment']} / {config['name']}: {status['state']} at {status['images']:,} images",
        title_justify="left",
        box=box.SIMPLE,
        caption=_conditions(config, lines),
        caption_justify="left",
    )
    for column in ("held-out score", "untrained", "trained", "real images"):
        table.add_column(column, justify="left" if column == "held-out score" else "right")
    for name, (words, form) in _SCORES.items():
        values = [line[name] for line in lines if line.get(name) is not None]
        if values:
            real = [line[f"{name}_real"] for line in lines if line.get(f"{name}_real") is not None]
            table.add_row(words, form.format(values[0]), form.format(values[-1]), form.format(real[-1]) if real else "")
    return table


def _conditions(config: dict[str, Any], lines: list[dict[str, Any]]) -> str:
    """What the scores depend on."""
    shared = f"{config['evaluation']['images']} images, EMA of half-life {config['ema_half_lives'][0]:,} images"
    if config["unet"] is None:
        return f"{shared}, posterior mean"
    sampler = config["sampler"]
    how = f"{sampler['schema']} {sampler['steps']} steps, guidance {sampler['guidance']:g}"
    return f"{shared}, {how}, seed {config['seed']}"


def _files(run_dir: RunDir, *, trains_first_stage: bool, told: bool) -> str:
    """Where things are, and what to type next; a model that is `told` nothing draws so many pictures."""
    path = run_dir.path
    lines = [
        f"  report       {run_dir.report}",
        f"  pictures     {run_dir.media}",
        f"  weights      {run_dir.weights}",
        f"  checkpoints  {run_dir.checkpoints}",
    ]
    if trains_first_stage:
        lines.append(f"  next         precompute_latents.py +experiment=NAME first_stage.checkpoint={path}")
    else:
        asked = "'prompts=[a caption]'" if told else "count=16"
        lines.append(f"  sample       python sample.py run_dir={path} {asked}")
        lines.append(f"  score        python evaluate.py run_dir={path}")
    return "\n".join(lines) + "\n" + closing_hint(run_dir) + "\n"


if __name__ == "__main__":
    closing(*[RunDir(Path(argument)) for argument in sys.argv[1:]])
