"""Scores of a first or second stage on held-out images: what training logs at intervals and `evaluate.py` prints.

Every rank computes the same, on fixed images with fixed noise, so a score depends on neither batch nor world.

Shape letters: N images in all, B images at once, C channels, H W height and width.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ldm_scale.core.tensors import to_uint8
from ldm_scale.data.config import DataConfig
from ldm_scale.data.order import Order
from ldm_scale.data.sources import ImageSource
from ldm_scale.evaluation.alignment import caption_accuracy
from ldm_scale.evaluation.distribution import FeatureMoments, Gaussian, frechet_distance
from ldm_scale.evaluation.features import Features, InceptionFeatures, RandomFeatures
from ldm_scale.evaluation.reconstruction import psnr, ssim
from ldm_scale.first_stage.base import FirstStage
from ldm_scale.jobs import config as jobs_config
from ldm_scale.latent_diffusion.generate import Generator

Between = Callable[[], None]
"""Called between batches of something that takes long; what it raises ends the rest."""
Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutImages:
    """Images that training does not see.

    images_NCHW  in [-1, 1], on the CPU
    captions     one each
    digest       of the shards they come from: which reference set a score was computed against
    """

    images_NCHW: Tensor
    captions: list[str]
    digest: str

    @classmethod
    def read(cls, data: DataConfig, count: int) -> "HeldOutImages":
        """The first `count` images of a fixed shuffle of `data.validation` (all of them, where there are fewer).

        raises  ValueError or FileNotFoundError naming data.validation
        """
        shards = data.open_validation()
        source = ImageSource(
            shards, Order(n=shards.n, seed=0), data.transform.build(), seed=0, task=data.task, threads=data.threads
        )
        batch = source.read(np.arange(min(count, shards.n)))
        return cls(images_NCHW=batch.images, captions=batch.captions, digest=shards.content_id)


class GenerationScores:
    """Frechet distance to held-out images and, in the toy world, caption accuracy of generated ones."""

    def __init__(
        self, config: jobs_config.EvaluationConfig, paths: jobs_config.PathsConfig, held_out: HeldOutImages
    ) -> None:
        self._config, self._held_out = config, held_out
        self._features = _features(config, paths)
        self._reference = _moments(self._features, list(held_out.images_NCHW.split(config.batch)))

    def __call__(self, generator: Generator, between: Between = lambda: None) -> dict[str, float]:
        """Generate one image for each of the first `evaluation.images` held-out captions, and score them."""
        captions = [self._held_out.captions[i % len(self._held_out.captions)] for i in range(self._config.images)]
        drawn = paused(generator.batches(captions, self._config.batch), between)
        batches = [images_BCHW.cpu() for images_BCHW in drawn]
        distance = frechet_distance(_moments(self._features, paused(batches, between)), self._reference)
        return {f"eval/{self._features.name}": distance, **self._caption_accuracy(captions, torch.cat(batches))}

    def real(self) -> dict[str, float]:
        """The same caption accuracy on the held-out images themselves: what a perfect model would reach."""
        held_out = self._held_out
        accuracy = self._caption_accuracy(held_out.captions, held_out.images_NCHW)
        return {f"{name}_real": value for name, value in accuracy.items()}

    def conditions(self, generator: Generator) -> dict[str, Any]:
        """What a score depends on besides the weights."""
        return {
            "n": self._config.images,
            "reference_images": len(self._held_out.images_NCHW),
            "reference": self._held_out.digest,
            "features": self._features.digest,
            "sampler": jobs_config.to_plain(generator.sampler)["schema"],
            "steps": generator.sampler.steps,
            "guidance": generator.sampler.guidance,
            "seed": generator.seed,
        }

    def _caption_accuracy(self, captions: list[str], images_NCHW: Tensor) -> dict[str, float]:
        if not self._config.caption_accuracy:
            return {}
        accuracy = caption_accuracy(captions, to_uint8(images_NCHW).permute(0, 2, 3, 1).numpy())
        return {
            "eval/caption_accuracy": accuracy.overall,
            "eval/colour_accuracy": accuracy.colour,
            "eval/shape_accuracy": accuracy.shape,
            "eval/position_accuracy": accuracy.position,
        }


class ReconstructionScores:
    """Fidelity of encoding and decoding held-out images with the mean of the posterior."""

    def __init__(
        self, config: jobs_config.EvaluationConfig, paths: jobs_config.PathsConfig, held_out: HeldOutImages
    ) -> None:
        self._config, self._held_out = config, held_out
        self._images_NCHW = held_out.images_NCHW[: config.images]
        self._features = _features(config, paths)
        self._reference = _moments(self._features, [self._images_NCHW])

    @torch.no_grad()
    def __call__(self, first_stage: FirstStage, between: Between = lambda: None) -> dict[str, float]:
        """PSNR in decibels, SSIM, and the Frechet distance of reconstructions to their originals."""
        parts = paused(self._images_NCHW.split(self._config.batch), between)
        pairs = [(part, reconstruct(first_stage, part)) for part in parts]
        return {
            "eval/psnr": float(torch.cat([psnr(rebuilt, images) for images, rebuilt in pairs]).mean()),
            "eval/ssim": float(torch.cat([ssim(rebuilt, images) for images, rebuilt in pairs]).mean()),
            f"eval/{self._features.name}": frechet_distance(
                _moments(self._features, paused([rebuilt for _, rebuilt in pairs], between)), self._reference
            ),
        }

    def conditions(self) -> dict[str, Any]:
        """What a score depends on besides the weights."""
        return {"n": len(self._images_NCHW), "reference": self._held_out.digest, "features": self._features.digest}


def paused(parts: Iterable[Part], between: Between) -> Iterator[Part]:
    """The same parts, with `between` called after each is made."""
    for part in parts:
        between()
        yield part


@torch.no_grad()
def reconstruct(first_stage: FirstStage, images_BCHW: Tensor) -> Tensor:
    """Images encoded to the mean of their posterior and decoded, clamped to [-1, 1], on the CPU."""
    device = next(first_stage.parameters()).device
    return first_stage.decode(first_stage.encode(images_BCHW.to(device)).mean).clamp(-1, 1).cpu()


def _moments(features: Features, batches: Iterable[Tensor]) -> Gaussian:
    moments = FeatureMoments(features.dim)
    for images_BCHW in batches:
        moments.add(features(images_BCHW))
    return moments.finish()


def _features(config: jobs_config.EvaluationConfig, paths: jobs_config.PathsConfig) -> Features:
    if config.features is jobs_config.Features.random:
        return RandomFeatures()
    return InceptionFeatures(Path(paths.weights))
