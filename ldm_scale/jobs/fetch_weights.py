"""Published weights, fetched once on a machine with internet, verified, and laid out as the jobs read them offline.

    python -m ldm_scale.jobs.fetch_weights DIRECTORY [--only NAME ...]

DIRECTORY is what `paths.weights` names (LDM_SCALE_WEIGHTS); copy it to machines without internet. A fetch that breaks
off goes on where it was. `manifest.json` there keeps source, licence and sha256 of every file: where a digest is
published, a file must have it; where none is, that of the first fetch is kept, and holds ever after. LPIPS's linear
weights come with its package.
"""

import argparse
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm_scale.core import runtime, storage, weights
from ldm_scale.evaluation.features import INCEPTION_FILE, INCEPTION_SHA256
from ldm_scale.first_stage.loss import VGG16_FILE
from ldm_scale.interop import bundle, compvis

MANIFEST = "manifest.json"

_HUB = "https://huggingface.co"
_ANSWER_S = 60.0  # without a byte


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One file as its authors publish it."""

    file: str
    """Where it goes, below the directory of weights."""
    url: str
    licence: str
    sha256: str | None = None
    """The published digest, or how it begins; None where none is published."""


def _from_hub(name: str, folder: str, licence: str, *files: str) -> list[Published]:
    return [
        Published(file=f"{folder}/{file}", url=f"{_HUB}/{name}/resolve/main/{file}", licence=licence) for file in files
    ]


_TORCH_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_LATENT_DIFFUSION = "https://raw.githubusercontent.com/CompVis/latent-diffusion/main/models/first_stage_models"
_FILES = "https://ommer-lab.com/files/latent-diffusion"


def _first_stage(name: str, published: str) -> list[Published]:
    urls = {"config.yaml": f"{_LATENT_DIFFUSION}/{published}/config.yaml", "model.zip": f"{_FILES}/{published}.zip"}
    return [Published(file=f"{name}/original/{file}", url=url, licence="MIT") for file, url in urls.items()]


WEIGHTS: dict[str, list[Published]] = {
    "inception": [
        Published(
            file=INCEPTION_FILE, url=f"{_TORCH_FIDELITY}/{INCEPTION_FILE}", licence="Apache-2.0",
            sha256=INCEPTION_SHA256,
        ),
    ],
    "vgg16": [
        Published(
            file=VGG16_FILE, url=f"https://download.pytorch.org/models/{VGG16_FILE}", licence="BSD-3-Clause",
            sha256=VGG16_FILE.removesuffix(".pth").rpartition("-")[2],
        ),
    ],
    "bert": _from_hub("google-bert/bert-base-uncased", "bert-base-uncased", "Apache-2.0", "tokenizer.json"),
    "clip": _from_hub(
        "openai/clip-vit-large-patch14", "clip-vit-large-patch14", "MIT", "config.json", "model.safetensors",
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "vocab.json", "merges.txt",
    ),
    "kl_f8": _first_stage("kl_f8", "kl-f8"),
    "vq_f4": _first_stage("vq_f4", "vq-f4"),
}  # fmt: skip
"""By name: for FID, for LPIPS, for captions of the 1.45B model, for CLIP, its first stage, that of most others."""

LATENT_SCALES = {"kl_f8": 0.18215, "vq_f4": 1.0}
"""Of first stages: what their published second stages multiply latents by; their own files do not say."""


def fetch(files: Sequence[Published], directory: Path) -> None:
    """Bring files that are absent or damaged, and verify all of them.

    raises  OSError where a server does not give one, ValueError where it gives other bytes than it should
    """
    for one in files:
        path, recorded = directory / one.file, _recorded(directory)
        wanted = one.sha256 or (recorded[one.file]["sha256"] if one.file in recorded else "")
        sha256 = storage.sha256_file(path) if path.is_file() else None
        if sha256 is None or not sha256.startswith(wanted):
            print(f"  {one.file}: {'absent' if sha256 is None else 'damaged'}, from {one.url}", flush=True)
            sha256 = _bring(one.url, path, wanted)
        size = path.stat().st_size
        entry = {"url": one.url, "licence": one.licence, "bytes": size, "sha256": sha256}
        storage.write_json(directory / MANIFEST, recorded | {one.file: entry})
        print(f"  {one.file}: {size / 1e6:,.1f} MB, sha256 {sha256}", flush=True)


def _recorded(directory: Path) -> dict[str, Any]:
    file = directory / MANIFEST
    return dict(storage.read_json(file)) if file.exists() else {}


def _bring(url: str, path: Path, wanted: str) -> str:
    """Download a file whose sha256 begins with `wanted`; returns the whole digest."""
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        while not storage.persist(url, lambda: _stretch(url, part)):
            pass
    except urllib.error.HTTPError as error:
        raise OSError(f"{url}: {error}") from error
    sha256 = storage.sha256_file(part)
    if not sha256.startswith(wanted):
        part.unlink()
        raise ValueError(f"{url} gave a file of sha256 {sha256}, not {wanted}; it is not kept")
    os.replace(part, path)
    return sha256


def _stretch(url: str, part: Path) -> bool:
    """Ask for what `part` lacks; whether all of it came. An attempt that brought bytes is no failed one.

    raises  OSError where none came
    """
    before = _size(part)
    try:
        _request(url, part, before)
    except (OSError, http.client.HTTPException):
        if _size(part) <= before:
            raise
        return False
    return True


def _request(url: str, part: Path, start: int) -> None:
    """Append the bytes from `start` on, or write all of them where the server knows no ranges."""
    # One byte more than is lacking: a range that begins at the end of a file is an error.
    asked = {"User-Agent": "ldm_scale"} | ({"Range": f"bytes={start - 1}-"} if start else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=asked), timeout=_ANSWER_S) as answer:
        goes_on = answer.status == http.client.PARTIAL_CONTENT
        with open(part, "r+b" if goes_on else "wb") as file:
            file.seek(start - 1 if goes_on else 0)
            length = answer.headers["Content-Length"]
            end = None if length is None else file.tell() + int(length)
            shutil.copyfileobj(answer, file)
            if end is not None and file.tell() != end:
                raise OSError(f"{file.tell():,} of {end:,} bytes came")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def import_first_stage(name: str, directory: Path) -> None:
    """An original first stage as `first_stage.checkpoint=DIRECTORY/NAME`, from what was fetched."""
    original, out = directory / name / "original", directory / name
    if (out / "config.json").exists():
        return
    with zipfile.ZipFile(original / "model.zip") as archive:
        (member,) = (member for member in archive.namelist() if member.endswith(".ckpt"))
        checkpoint = Path(archive.extract(member, original))
    first_stage = compvis.load(original / "config.yaml", checkpoint).first_stage
    config = replace(first_stage.config, scale=LATENT_SCALES[name])
    weights.save(out, {bundle.FIRST_STAGE: bundle.to_plain(config)}, first_stage.state_dict())
    checkpoint.unlink()  # the archive stays
    print(f"  {name}: imported, sha256 of its weights {first_stage.digest()}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 where something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m ldm_scale.jobs.fetch_weights", description="Fetch published weights, for jobs without internet."
    )
    parser.add_argument("directory", type=Path, help="where they go: what paths.weights or LDM_SCALE_WEIGHTS names")
    parser.add_argument("--only", nargs="+", choices=sorted(WEIGHTS), default=list(WEIGHTS), help="some of them")
    arguments = parser.parse_args(argv)
    runtime.configure_logging()
    try:
        for name in arguments.only:
            print(name, flush=True)
            fetch(WEIGHTS[name], arguments.directory)
            if name in LATENT_SCALES:
                import_first_stage(name, arguments.directory)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"All in {arguments.directory}. Jobs read it by paths.weights={arguments.directory}, or LDM_SCALE_WEIGHTS.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
