"""`repro.json`: what a run was made of, one entry for each launch, so that it can be made again a year later.

A metrics line at `images_seen` was written by the last launch that began below it (`launch_of`): what a killed process
logged beyond its last checkpoint is taken back when the next one goes on.
"""

import json
import platform
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.secrets import without_secrets
from ldm_scale.data.sources import ImageSource, LatentSource, MixedSource, SampleSource
from ldm_scale.training.engine import Engine

_CODE = Path(__file__).parents[2]
_GIT_S = 20.0  # a repository on a slow file system must not hold up a thousand processes

log = runtime.logger(__name__)


def record(
    run_dir: RunDir,
    config: dict[str, Any],
    engine: Engine,
    state: dict[str, Any],
    source: SampleSource[Any],
    images: int,
) -> None:
    """Add this launch to `repro.json`. Called by rank 0, before the first step.

    config  the resolved configuration, as JSON values
    state   what checkpoints of this run carry: order, order_id, latent scale, sha256 of the first stage
    images  images seen so far
    """
    launch = {
        "images_seen": images,
        "time": time.time(),
        "command": without_secrets(sys.argv),
        "config_sha256": storage.digest(config),
        "config": config,
        **{key: value for key, value in state.items() if key != "images_seen"},
        "data": _data(source),
        "engine": described(engine),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": sys.version,
        "cuda": {"torch": torch.version.cuda, "cudnn": torch.backends.cudnn.version()},
        "packages": dict(sorted({d.metadata["Name"]: d.version for d in metadata.distributions()}.items())),
        "code": _code(run_dir),
    }
    if launch["code"] is None:
        log.warning("%s cannot say which code runs: %s is no checkout, and has no snapshot.json", run_dir.repro, _CODE)
    storage.write_json(run_dir.repro, {"launches": [*launches(run_dir), launch]})


def keep_manifests(run_dir: RunDir, source: SampleSource[Any], conditions: dict[str, Any]) -> None:
    """Copy what says what latents are made of, for the day when their cache is gone. Called by rank 0.

    conditions  what scores depend on: the reference's digest among them
    """
    run_dir.manifests.mkdir(exist_ok=True)
    parts = source.sources if isinstance(source, MixedSource) else {"latents": source}
    for name, part in parts.items():
        if isinstance(part, LatentSource):
            with storage.open_read(f"{part.cache.folder}/manifest.json") as file:
                storage.write_json(run_dir.manifests / f"{name}.json", json.load(file))
    storage.write_json(run_dir.manifests / "evaluation.json", conditions)


def launches(run_dir: RunDir) -> list[dict[str, Any]]:
    """What was recorded so far, in order of time."""
    if not run_dir.repro.exists():
        return []
    found: list[dict[str, Any]] = storage.read_json(run_dir.repro)["launches"]
    return found


def launch_of(run_dir: RunDir, images: int) -> dict[str, Any]:
    """The launch whose process took the step that ends at `images`.

    raises  FileNotFoundError where none is on record
    """
    found = [launch for launch in launches(run_dir) if launch["images_seen"] < images]
    if not found:
        raise FileNotFoundError(f"{run_dir.repro} tells of no launch that trained up to {images:,} images")
    return found[-1]


def described(engine: Engine) -> dict[str, Any]:
    """Everything about an engine that the last bits of a loss may depend on."""
    device = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if engine.device.type == "cuda":
        device = torch.cuda.get_device_name(engine.device)
    return {
        "kind": engine.kind.value,
        "precision": engine.precision.value,
        "world": engine.world,
        "micro_batch": engine.micro_batch,
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _data(source: SampleSource[Any]) -> dict[str, Any]:
    """Which bytes the samples are, by data set."""
    match source:
        case MixedSource():
            return {name: _data(part) for name, part in source.sources.items()}
        case LatentSource():
            cache = source.cache
            return {
                "latents": cache.folder,
                "order_id": cache.order_id,
                "content_id": cache.content_id,
                "fingerprint": cache.manifest.fingerprint,
            }
        case ImageSource():
            return {"order_id": source.shards.order_id, "content_id": source.shards.content_id}
    return {"order_id": source.order_id}


def _code(run_dir: RunDir) -> dict[str, Any] | None:
    """Commit, and what differs from it (kept beside); None where the code is no checkout, nor the copy of one."""
    if (noted := _CODE / "snapshot.json").exists():  # copies by launchers/slurm/submit, and images, have one
        return {**storage.read_json(noted), "snapshot": str(_CODE)}
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    if commit is None or changed is None:
        return None
    if not changed:
        return {"commit": commit.strip(), "dirty": False}
    difference = (_git("diff", "HEAD") or "").encode()
    name = f"code_{storage.digest(difference.decode())[:12]}.diff"
    with storage.atomic_write(run_dir.path / name) as file:
        file.write(difference)
    return {"commit": commit.strip(), "dirty": True, "changed": changed.splitlines(), "diff": name}


def _git(*arguments: str) -> str | None:
    """What git says of the directory that this code lies in; None where it says nothing."""
    if not (_CODE / ".git").exists():
        return None
    try:
        said = subprocess.run(
            ["git", "-C", str(_CODE), *arguments], capture_output=True, check=True, timeout=_GIT_S, encoding="utf-8",
            errors="replace",
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout
