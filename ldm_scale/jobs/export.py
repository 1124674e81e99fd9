"""Inference weights out of a training run: any checkpoint, raw or averaged. Needs no process group and no GPU.

python -m ldm_scale.jobs.export RUN|CHECKPOINT OUT [--weights raw|ema|ema/HALF_LIFE] [--diffusers]
                                                   [--artifact references|files]

OUT/first_stage, OUT/latent_diffusion   `sample.py model=OUT`, `init=OUT`, `first_stage.checkpoint=OUT/first_stage`
OUT/tokenizer.json                      a copy, where the model's tokenizer is a file or directory
OUT/diffusers                           asked for: what diffusers' `from_pretrained` reads
OUT/export.json                         which run, checkpoint and weights these are; written last

`--artifact` logs OUT to W&B too, in a run of its own beside the training's: where it lies, with digests, or the files.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm_scale.conditioning.base import Conditioner
from ldm_scale.conditioning.clip_text import ClipTextConditioner
from ldm_scale.conditioning.text import TextConditioner
from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.interop import bundle as bundles
from ldm_scale.interop import diffusers
from ldm_scale.interop.bundle import Bundle
from ldm_scale.jobs import loading
from ldm_scale.tracking.artifacts import Artifacts, send_weights
from ldm_scale.tracking.weights_and_biases import Place, run_id
from ldm_scale.training import checkpoint_files
from ldm_scale.training.checkpoint_files import CheckpointError


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """One set of weights of a training run."""

    bundle: Bundle
    size: int
    """Side of the images it was trained on, pixels."""
    checkpoint: Path
    which: str
    """`raw`, `ema` or `ema/HALF_LIFE`, as it was asked for."""

    def write(self, out: Path, *, as_diffusers: bool) -> list[Path]:
        """Write the model directory, and say what is in it.

        raises  ValueError for a model that diffusers has no class for, before anything is written
        """
        written = []
        if as_diffusers:
            diffusers.export(self.bundle, out / "diffusers", size=self.size)
            written.append(out / "diffusers")
        _take_tokenizer(self.bundle.conditioner, out)
        written += bundles.save(self.bundle, out)
        images_seen = checkpoint_files.read_state(self.checkpoint)["images_seen"]
        said = {"checkpoint": str(self.checkpoint.resolve()), "weights": self.which, "images_seen": images_seen}
        storage.write_json(out / "export.json", said)
        return written


def load(given: Path, which: str) -> Exported:
    """The weights `which` of a training run, or of one of its checkpoints, on the CPU.

    raises  FileNotFoundError where there is none, ValueError for weights it does not have
    """
    run_dir, name = locate(given)
    run_weights = loading.RunWeights(run_dir, name=name, which=which)
    if run_weights.trained_first_stage:
        return _first_stage(run_weights, which)
    source = loading.TrainingRun(run_dir, name=name, which=which)
    trained = source.load(torch.device("cpu"))
    bundle = Bundle(
        first_stage=trained.first_stage,
        unet=trained.model.unet,
        conditioner=trained.model.conditioner,
        diffusion=trained.model.config.diffusion,
        latent_scale=trained.latent_scale,
    )
    return Exported(bundle=bundle, size=source.size, checkpoint=source.checkpoint, which=which)


def locate(given: Path) -> tuple[RunDir, str]:
    """The run of a path that names a run or one of its checkpoints, and the checkpoint's name, or `latest`.

    raises  FileNotFoundError where the path names neither
    """
    above = RunDir(given.parent.parent)
    for run_dir, name in ((RunDir(given), "latest"), (above, given.name)):
        if run_dir.config.exists() and (name == "latest" or given.parent == run_dir.checkpoints):
            return run_dir, name
    raise FileNotFoundError(f"{given} is neither a training run (it has no config.json) nor a checkpoint of one")


def _first_stage(run_weights: loading.RunWeights, which: str) -> Exported:
    network = run_weights.first_stage()
    scale = network.config.scale
    bundle = Bundle(
        first_stage=network, unet=None, conditioner=None, diffusion=None, latent_scale=1.0 if scale is None else scale
    )
    size = run_weights.data.transform.size
    return Exported(bundle=bundle, size=size, checkpoint=run_weights.checkpoint, which=which)


def _take_tokenizer(conditioner: Conditioner | None, out: Path) -> None:
    """Copy a tokenizer that lies on a disk, and let the model name the copy; one on a hub stays there."""
    if isinstance(conditioner, TextConditioner):
        conditioner.config.tokenizer = _copied(conditioner.config.tokenizer, out)
    if isinstance(conditioner, ClipTextConditioner):
        conditioner.config.model = _copied(conditioner.config.model, out)


def _copied(source: str, out: Path) -> str:
    given = Path(source)
    if not given.exists():
        return source
    copy = (out / ("tokenizer" if given.is_dir() else "tokenizer.json")).resolve()
    copy.parent.mkdir(parents=True, exist_ok=True)
    if given.is_dir():
        shutil.copytree(given, copy, dirs_exist_ok=True)
    else:
        shutil.copyfile(given, copy)
    return str(copy)


def _logged(run_dir: RunDir, out: Path, how: Artifacts) -> str:
    """Log what was written to W&B; returns what to tell the user."""
    folder = run_dir.path / "export"
    folder.mkdir(exist_ok=True)
    run = Place.of(storage.read_json(run_dir.config)).beside(run_dir, "export", folder=folder)
    name = f"export-{run_id(run_dir)}"
    send_weights(run, name, out, how, storage.read_json(out / "export.json"))
    run.finish()
    where = f"wandb sync {Path(run.dir).parent}" if run.offline else run.url
    return f"  W&B artifact {name}: {where}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.export", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="a training run (its newest sound checkpoint) or one of its checkpoints")
    parser.add_argument("out", type=Path, help="where the model directory is written")
    parser.add_argument("--weights", default="ema", help="raw, ema (the first half-life) or ema/HALF_LIFE")
    parser.add_argument("--artifact", choices=["references", "files"], help="log OUT to W&B: where it lies, or whole")
    parser.add_argument("--diffusers", action="store_true", help="write OUT/diffusers too")
    arguments = parser.parse_args(argv)
    runtime.configure_logging()
    try:
        exported = load(arguments.run, arguments.weights)
        written = exported.write(arguments.out, as_diffusers=arguments.diffusers)
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.weights} weights of {exported.checkpoint}")
    for path in written:
        print(f"  wrote {path}")
    if arguments.artifact:
        print(_logged(locate(arguments.run)[0], arguments.out, Artifacts(arguments.artifact)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
