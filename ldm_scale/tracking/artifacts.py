"""What a finished training leaves, as W&B artifacts: its weights and its manifests. Only where it is asked for.

    weights-ID     the inference weights, `RUN/weights`: by reference (path, size, digest), or uploaded
    manifests-ID   configuration, repro.json and `RUN/manifests`: some kilobytes to megabytes, always uploaded

What W&B copies of them before it uploads lies in the run directory too, and not in the user's home.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm_scale.core.run_dir import RunDir

if TYPE_CHECKING:
    import wandb

_LOG = logging.getLogger(__name__)
_STAGING = "WANDB_DATA_DIR"  # W&B's own variable; it has no setting for it


class Artifacts(Enum):
    """What W&B is given of a finished training besides numbers and pictures."""

    none = "none"
    """Nothing."""
    references = "references"
    """Manifests, and where the weights lie with their digests: who can read that path can fetch them by W&B."""
    files = "files"
    """Manifests and the weights themselves: 4 bytes a parameter are uploaded."""


def send_artifacts(run: "wandb.Run", run_dir: RunDir, how: Artifacts, images_seen: int) -> None:
    """Log both artifacts of a training, offline too: `wandb sync` then uploads what is to be uploaded."""
    if how is Artifacts.none:
        return
    import wandb

    about = {"images_seen": images_seen, "run": str(run_dir.path)}
    send_weights(run, f"weights-{run.id}", run_dir.weights, how, about)
    manifests = wandb.Artifact(f"manifests-{run.id}", type="manifests", metadata=about)
    told = [path for path in (run_dir.config, run_dir.repro, *sorted(run_dir.manifests.glob("*"))) if path.exists()]
    with staged_in(run_dir.wandb):
        for path in told:
            manifests.add_file(str(path), name=path.name, skip_cache=True)
        run.log_artifact(manifests, aliases=[f"images_{images_seen}"])
    _LOG.info("W&B artifact %s: uploads %s", manifests.name, _size(told))


def send_weights(run: "wandb.Run", name: str, folder: Path, how: Artifacts, about: Mapping[str, Any]) -> None:
    """Log every file of a model directory as one artifact.

    about  what is known of it, `images_seen` among it
    """
    import wandb

    weights = wandb.Artifact(name, type="weights", metadata=dict(about))
    held = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in held:
        inside = str(path.relative_to(folder))
        if how is Artifacts.references:
            weights.add_reference(f"file://{path.absolute()}", name=inside)
        else:  # as it is: a copy would take as much room again
            weights.add_file(str(path), name=inside, policy="immutable", skip_cache=True)
    run.log_artifact(weights, aliases=[f"images_{about['images_seen']}"])
    does = "refers to" if how is Artifacts.references else "uploads"
    _LOG.info("W&B artifact %s: %s %s", name, does, _size(held))


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """W&B copies files of artifacts and tables into a folder of this one, unless the user named another."""
    if _STAGING in os.environ:
        yield
        return
    os.environ[_STAGING] = str(folder.absolute())
    try:
        yield
    finally:
        del os.environ[_STAGING]


def _size(paths: Sequence[Path]) -> str:
    return f"{len(paths)} files, {sum(path.stat().st_size for path in paths) / 1e6:,.1f} MB"
