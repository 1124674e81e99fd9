"""What a set of images is compared by: taken in batch by batch on every rank, summed over ranks, kept as a reference.

Images in, statistics out, two of them to scores. Nothing grows with the number of images but the features themselves,
and they are kept only for scores that need every one of them.

Shape letters: B batch, N images in all, C channels, H W height and width, D feature width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from ldm_scale.core import runtime, shares, storage
from ldm_scale.evaluation.distribution import (
    Estimate,
    FeatureMoments,
    Gaussian,
    InceptionScore,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from ldm_scale.evaluation.features import Features


class Score(Enum):
    """What two sets of images are compared by."""

    frechet = "frechet"
    """FID, where the features are the published Inception's."""
    kernel = "kernel"
    """KID. Keeps all features, 8 KB an image."""
    precision_recall = "precision_recall"
    """Improved precision and recall; on Inception's features by ADM's protocol. Keeps all features."""
    inception_score = "inception_score"
    """Of the generated images alone; needs a network that classifies."""

    @property
    def needs_every_feature(self) -> bool:
        return self in (Score.kernel, Score.precision_recall)


_KEPT = {Score.frechet: "mean", Score.kernel: "features", Score.precision_recall: "features"}  # in a reference's file


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Statistics:
    """What one set of images is compared by."""

    count: int
    gaussian: Gaussian | None
    """None where no distance was asked for."""
    features_ND: Tensor | None
    """Float32, on the CPU; None where no score needs them."""
    inception: Estimate | None
    """None where it was not asked for."""


class Collector:
    """Takes in a set of images, each once, on one rank or another."""

    def __init__(self, features: Features, count: int, scores: Sequence[Score]) -> None:
        """Begin with none.

        features  on the device that it is to run on
        count     images in all
        raises    ValueError where a score needs what `features` or the number of images does not give
        """
        self._features, self._count = features, count
        self._device = next(iter(features.state_dict().values())).device
        self._moments = FeatureMoments(features.dim) if Score.frechet in scores else None
        keeps = any(score.needs_every_feature for score in scores)
        self._features_ND = torch.zeros(count, features.dim) if keeps else None
        self._inception = None
        if Score.inception_score in scores:
            if features.classes is None:
                raise ValueError(
                    f"evaluation.scores asks for inception_score, but evaluation.features gives {features.name}, which "
                    "does not classify; take features=inception, or leave it out"
                )
            self._inception = InceptionScore(count, features.classes)

    def look(self, images_BCHW: Tensor) -> Tensor:
        """What `add` takes of images, (B, 3, H, W) in [-1, 1]: their features, (B, D) float32, on the CPU."""
        return self._features(images_BCHW.to(self._device)).cpu()

    def add(self, start: int, features_BD: Tensor) -> None:
        """Take in images `start`, `start` + 1, ..., of which these are the features."""
        if self._moments is not None:
            self._moments.add(features_BD)
        if self._features_ND is not None:
            self._features_ND[start : start + len(features_BD)] = features_BD
        if self._inception is not None:
            self._inception.add(start, self._features.logits(features_BD.to(self._device)))

    def finish(self) -> Statistics:
        """The statistics of what all ranks took in. Collective."""
        moments, inception = self._moments, self._inception
        if moments is not None:
            shares.add_up(moments.count, moments.sum_D, moments.outer_DD)
        if self._features_ND is not None:
            shares.add_up(self._features_ND)  # rows of other ranks are zero
        if inception is not None:
            shares.add_up(inception.counts_S, inception.classes_SK, inception.negentropies_S)
        return Statistics(
            count=self._count,
            gaussian=None if moments is None else moments.finish(),
            features_ND=self._features_ND,
            inception=None if inception is None else inception.finish(),
        )


def compare(generated: Statistics, reference: Statistics, scores: Sequence[Score], name: str) -> dict[str, float]:
    """Scores of one set against another, by name, the same on every rank. Collective.

    name  of the Frechet distance (`Features.name`); the others are named after it: where it is `fid`, as papers do
    """
    found: dict[str, float] = {}
    published, suffix = name.startswith("fid"), name.removeprefix("fid").removeprefix("fd")
    if Score.frechet in scores:
        assert generated.gaussian is not None and reference.gaussian is not None, "collected for it"
        own = frechet_distance(generated.gaussian, reference.gaussian) if runtime.is_main() else 0.0
        found[name] = runtime.gathered(own)[0]  # ranks that factorised it all at once would fight for the cores
    if Score.kernel in scores:
        kernel = kernel_distance(*_every_feature(generated, reference))
        found[f"{'kid' if published else 'kd'}{suffix}"] = kernel.mean
    if Score.precision_recall in scores:
        share = precision_recall(*_every_feature(generated, reference))
        found |= {f"precision{suffix}": share.precision, f"recall{suffix}": share.recall}
    if Score.inception_score in scores and generated.inception is not None:
        found |= {
            f"inception_score{suffix}": generated.inception.mean,
            f"inception_score{suffix}_std": generated.inception.std,
        }
    return found


def _every_feature(generated: Statistics, reference: Statistics) -> tuple[Tensor, Tensor]:
    assert generated.features_ND is not None and reference.features_ND is not None, "collected for these scores"
    return generated.features_ND, reference.features_ND


def save_reference(path: Path, statistics: Statistics, origin: Mapping[str, Any]) -> None:
    """Write a reference set's statistics.

    origin  what they are of, plain values: features and transform are what a reader must agree with
    """
    tensors: dict[str, Tensor] = {}
    if statistics.gaussian is not None:
        tensors |= {"mean": statistics.gaussian.mean, "covariance": statistics.gaussian.covariance}
    if statistics.features_ND is not None:
        tensors["features"] = statistics.features_ND
    told = {**origin, "count": statistics.count}
    with storage.atomic_write(path) as file:
        file.write(safetensors.torch.save(tensors, {"origin": storage.canonical_json(told).decode()}))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reference:
    """A reference set's statistics, as a file keeps them."""

    statistics: Statistics
    origin: dict[str, Any]
    digest: str
    """sha256 of the file: which reference a score was computed against."""


def _said(value: Any) -> Any:
    """Without keys that are None: files that are older than such a key do not have it."""
    return {key: one for key, one in value.items() if one is not None} if isinstance(value, Mapping) else value


def load_reference(path: Path, wanted: Mapping[str, Any], scores: Sequence[Score]) -> Reference:
    """Read what `save_reference` wrote.

    wanted  what its origin must say
    scores  what it will be compared by
    raises  FileNotFoundError where there is none, ValueError where it was made otherwise, naming both sides
    """
    if not path.exists():
        raise FileNotFoundError(
            f"evaluation.reference={path} does not exist: write it with `python evaluate.py write_reference={path} ...`"
        )
    with safe_open(str(path), "pt") as file:
        origin = json.loads(file.metadata()["origin"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if differing := [name for name in wanted if _said(origin[name]) != _said(wanted[name])]:
        sides = "; ".join(f"{name}: {origin[name]} there, {wanted[name]} here" for name in differing)
        raise ValueError(f"evaluation.reference={path} was made otherwise: {sides}. Write it anew for this run")
    gaussian = Gaussian(origin["count"], tensors["mean"], tensors["covariance"]) if "mean" in tensors else None
    if lacking := [score.value for score in scores if score in _KEPT and _KEPT[score] not in tensors]:
        raise ValueError(
            f"evaluation.reference={path} was written without what {', '.join(lacking)} of evaluation.scores need: "
            "write it anew with these scores, or leave them out"
        )
    return Reference(
        statistics=Statistics(
            count=origin["count"],
            gaussian=gaussian,
            features_ND=tensors.get("features"),
            inception=None,
        ),
        origin=origin,
        digest=storage.sha256_file(path),
    )
