"""Scores of a first or second stage on held-out images: what training logs at intervals and `evaluate.py` prints.

All ranks share the work. Which images are a batch, and their noise, depend on their numbers alone, so a score depends
on neither world nor time. Images are read, made and looked at batch by batch; none is kept.

Shape letters: N images in all, B images at once, C channels, H W height and width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ldm_scale.core import runtime, storage
from ldm_scale.core.shares import add_up, ranges, shared
from ldm_scale.core.tensors import to_uint8
from ldm_scale.data.cache import LatentStatistics
from ldm_scale.data.config import DataConfig
from ldm_scale.data.order import Order
from ldm_scale.data.shards import RemovedSample
from ldm_scale.data.sources import ImageBatch, ImageSource
from ldm_scale.evaluation.alignment import ClipScore, caption_accuracy
from ldm_scale.evaluation.features import Features, InceptionFeatures, RandomFeatures, Resizing, VggFeatures
from ldm_scale.evaluation.reconstruction import detail, psnr, ssim
from ldm_scale.evaluation.statistics import Collector, Statistics, compare, load_reference
from ldm_scale.first_stage.base import FirstStage, Rebuilt
from ldm_scale.first_stage.loss import AutoencoderLossConfig, Perceptual, PerceptualKind, perceptual_network, vgg16_file
from ldm_scale.first_stage.vq import AutoencoderVQConfig, perplexity, usage
from ldm_scale.images.resize import ImageTransformConfig
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs.kept import Between, Kept, Result, results
from ldm_scale.jobs.schemas.experiment import EvaluationConfig, FeatureNetwork, PathsConfig
from ldm_scale.latent_diffusion.generate import Generator
from ldm_scale.tracking.grid import labelled_grid


class Readable(Protocol):
    """Images by number, each always the same."""

    def read(self, positions: np.ndarray) -> ImageBatch:
        """Those of these numbers."""
        ...


class HeldOutImages:
    """Images that training does not see, in a fixed shuffle; read when they are looked at.

    count      how many of them are used
    digest     of the shards they come from: which reference set a score was computed against
    transform  what brings them to size, the same way each time
    """

    def __init__(self, source: Readable, count: int, digest: str, transform: ImageTransformConfig) -> None:
        self._source, self.count, self.digest, self.transform = source, count, digest, transform

    @classmethod
    def open(cls, data: DataConfig, count: int | None) -> "HeldOutImages":
        """The first `count` images of `data.validation` (all of them, where there are fewer, or it is None).

        raises  ValueError or FileNotFoundError naming data.validation
        """

        def refuse(key: str, reason: str, position: int) -> None:
            if reason != RemovedSample.REASON:
                raise ValueError(
                    f"{key} of the held-out images {data.validation} cannot be read: {reason}. A score is of all of "
                    "them: mend it, or write the shards without it"
                )

        shards, transform = data.open_validation(), data.transform.fixed
        source = ImageSource(
            shards, Order(n=shards.n, seed=0), transform.build(), seed=0, task=data.task, threads=data.threads,
            on_bad=refuse,
        )  # fmt: skip
        return cls(source, shards.n if count is None else min(count, shards.n), shards.content_id, transform)

    def read(self, indices: Sequence[int]) -> ImageBatch:
        """Images in [-1, 1], on the CPU, with their captions.

        raises  ValueError naming one that cannot be read
        """
        return self._source.read(np.array(indices))

    def shared(self, batch: int, between: Between = lambda: None) -> Iterator[tuple[range, ImageBatch, bool]]:
        """This rank's batches of them: numbers, images, and whether they count (see core/shares.py). Collective.

        raises  ValueError on all ranks where one cannot be read
        """
        for indices, counts in shared(ranges(self.count, batch)):
            between()
            yield indices, runtime.together(partial(self.read, indices)), counts


class GenerationScores:
    """Distance of generated images to a reference set; CLIP score; in the toy world, caption accuracy."""

    def __init__(
        self,
        config: EvaluationConfig,
        paths: PathsConfig,
        held_out: HeldOutImages,
        device: torch.device,
        between: Between = lambda: None,
        beside: Callable[[range, Tensor], None] = lambda indices, images_BCHW: None,
    ) -> None:
        """Look at the reference set. Collective.

        beside  shown each batch of this rank too, so that held-out images are read once
        raises  ValueError where evaluation.reference did not prepare its images as the held-out ones are
        """
        self._config, self._held_out = config, held_out
        self._features = features_of(config, paths).to(device)
        self._clip = None if config.clip is None else ClipScore(config.clip).to(device)
        captions: list[tuple[int, list[str]]] = []
        look = self._look(held_out.count) if config.reference is None else None
        for indices, batch, counts in held_out.shared(config.batch, between):
            if counts:
                captions.append((indices.start, batch.captions))
                beside(indices, batch.images)
                if look is not None:
                    look.add(indices.start, look.see(batch.images, batch.captions))
        parts = sorted(part for rank in runtime.gathered(captions) for part in rank)
        self.captions = [caption for _, part in parts for caption in part]
        """Of the held-out images, in their order."""
        if look is not None:
            self._reference, self._real = look.finish()
            self._reference_is = held_out.digest
        else:
            transform = jobs_config.to_plain(held_out.transform)
            wanted = {"features": self._features.digest, "transform": transform}
            kept = load_reference(Path(str(config.reference)), wanted, config.scores)
            self._reference, self._real, self._reference_is = kept.statistics, {}, kept.digest

    def __call__(
        self, generator: Generator, between: Between = lambda: None, kept: Kept | None = None
    ) -> dict[str, float]:
        """Generate `evaluation.images` images of held-out captions, and score them. Collective.

        kept  where what was done before is found, of the same `identity` with the same weights
        """
        look = self._look(self._config.images)

        def seen(indices: range) -> Result:
            captions = [self.captions[i % len(self.captions)] for i in indices]
            return look.see(generator.images(captions, indices), captions)

        for indices, result in results(ranges(self._config.images, self._config.batch), seen, between, kept):
            look.add(indices.start, result)
        statistics, alignment = look.finish()
        found = compare(statistics, self._reference, self._config.scores, self._features.name)
        return {f"eval/{name}": value for name, value in {**found, **alignment}.items()}

    def real(self) -> dict[str, float]:
        """CLIP score and caption accuracy of the held-out images themselves: what a perfect model would reach."""
        return {f"eval/{name}_real": value for name, value in self._real.items()}

    def conditions(self, generator: Generator) -> dict[str, Any]:
        """What a score depends on besides the weights."""
        return {
            "n": self._config.images,
            "reference_images": self._reference.count,
            "reference": self._reference_is,
            "transform": jobs_config.to_plain(self._held_out.transform),
            "features": self._features.digest,
            "clip": None if self._clip is None else self._clip.digest,
            "sampler": jobs_config.to_plain(generator.sampler)["schema"],
            "steps": generator.sampler.steps,
            "guidance": generator.sampler.guidance,
            "seed": generator.seed,
        }

    def identity(self, generator: Generator) -> dict[str, Any]:
        """Everything that the look at a generated image depends on besides the weights; plain values."""
        return {
            **self.conditions(generator),
            "evaluation": jobs_config.to_plain(self._config),
            "captions": storage.digest(self.captions),
            "sampler": jobs_config.to_plain(generator.sampler),
            "model": jobs_config.to_plain(generator.model.config),
            "dtype": str(generator.model.compute_dtype),
            "first_stage": generator.first_stage.digest(),
            "latent_scale": generator.latent_scale,
            "size": list(generator.size),
        }

    def _look(self, count: int) -> "_Look":
        return _Look(self._config, self._features, self._clip, count)


class _Look:
    """Takes in a set of pictures with their captions: statistics of the one, how well they fit the other."""

    def __init__(self, config: EvaluationConfig, features: Features, clip: ClipScore | None, count: int) -> None:
        self._collector = Collector(features, count, config.scores)
        self._clip, self._is_toy, self._count = clip, config.caption_accuracy, count
        self._names = (*(["clip_score"] if clip else []), *(_ACCURACIES if self._is_toy else ()))
        self._sums = torch.zeros(len(self._names), dtype=torch.float64)

    def see(self, images_BCHW: Tensor, captions: list[str]) -> Result:
        """What `add` takes of pictures and captions."""
        sums: list[float] = []
        if self._clip is not None:
            sums.append(float(self._clip(captions, images_BCHW).double().sum()))
        if self._is_toy:
            accuracy = caption_accuracy(captions, to_uint8(images_BCHW).permute(0, 2, 3, 1).cpu().numpy())
            shares = (accuracy.overall, accuracy.colour, accuracy.shape, accuracy.position)
            sums += [share * accuracy.n for share in shares]
        return {"features": self._collector.look(images_BCHW), "sums": torch.tensor(sums, dtype=torch.float64)}

    def add(self, start: int, seen: Result) -> None:
        """Take in pictures `start`, `start` + 1, ... of which this was seen."""
        self._collector.add(start, seen["features"])
        self._sums += seen["sums"]

    def finish(self) -> tuple[Statistics, dict[str, float]]:
        """Of what all ranks took in. Collective."""
        add_up(self._sums)
        return self._collector.finish(), dict(zip(self._names, (self._sums / self._count).tolist(), strict=True))


_ACCURACIES = ("caption_accuracy", "colour_accuracy", "shape_accuracy", "position_accuracy")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reconstructions:
    """How faithfully a first stage gave images back.

    scores  over all images, by the names that they are logged by
    psnr_N  decibels of each image, in the order of the held-out set
    """

    scores: dict[str, float]
    psnr_N: Tensor


class ReconstructionScores:
    """Fidelity of encoding and decoding held-out images with the mean of the posterior.

    LPIPS is measured unless features are random: it needs published weights too.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        paths: PathsConfig,
        held_out: HeldOutImages,
        device: torch.device,
    ) -> None:
        """Prepare to look.

        raises  ValueError where there is an evaluation.reference, FileNotFoundError where weights are absent
        """
        if config.reference is not None:
            raise ValueError(
                f"evaluation.reference={config.reference}: a first stage gives held-out images back, and is compared "
                "to them: evaluation.reference=null"
            )
        self._config, self._held_out, self._device = config, held_out, device
        self._features = features_of(config, paths).to(device)
        is_random = config.features is FeatureNetwork.random
        perceptual = AutoencoderLossConfig(perceptual=PerceptualKind.none if is_random else PerceptualKind.lpips)
        lpips = perceptual_network(perceptual, paths.weights)
        self._measures: dict[str, Perceptual] = {"psnr": psnr, "ssim": ssim}
        if lpips is not None:
            self._measures["lpips"] = lpips.to(device)

    def __call__(
        self, first_stage: FirstStage, between: Between = lambda: None, kept: Kept | None = None
    ) -> Reconstructions:
        """PSNR in decibels, SSIM, LPIPS, distance of reconstructions to originals, use of a codebook; collective.

        And the fine detail of all reconstructions as a share of the originals'.

        kept  where what was done before is found, of the same `identity` with the same weights
        """
        count = self._held_out.count
        originals, copies = (Collector(self._features, count, self._config.scores) for _ in range(2))
        fidelity = {name: torch.zeros(count, dtype=torch.float64) for name in self._measures}
        details = torch.zeros(2, dtype=torch.float64)  # of reconstructions and of originals
        taken_K = torch.zeros(_codes(first_stage))
        parts = ranges(count, self._config.batch)
        for indices, seen in results(parts, lambda part: self._seen(first_stage, part), between, kept):
            originals.add(indices.start, seen["originals"])
            copies.add(indices.start, seen["copies"])
            for name in self._measures:
                fidelity[name][indices.start : indices.stop] = seen[name]
            details += seen["details"]
            taken_K += seen["taken"]
        add_up(taken_K, details, *fidelity.values())
        found = {name: float(values_N.mean()) for name, values_N in fidelity.items()}
        found["detail"] = float(details[0] / details[1])
        found |= compare(copies.finish(), originals.finish(), self._config.scores, self._features.name)
        if len(taken_K):
            found |= {"codebook_usage": float(usage(taken_K)), "codebook_perplexity": float(perplexity(taken_K))}
        return Reconstructions(scores={f"eval/{name}": value for name, value in found.items()}, psnr_N=fidelity["psnr"])

    @torch.no_grad()
    def _seen(self, first_stage: FirstStage, part: range) -> Result:
        """How these images are given back."""
        images_BCHW = self._held_out.read(part).images.to(self._device)
        rebuilt = reconstruct(first_stage, images_BCHW)
        codes = torch.zeros(0, dtype=torch.int64) if rebuilt.codes is None else rebuilt.codes.indices.flatten().cpu()
        return {
            **{name: measure(rebuilt.images, images_BCHW).cpu() for name, measure in self._measures.items()},
            "originals": self._features(images_BCHW).cpu(),
            "copies": self._features(rebuilt.images).cpu(),
            "details": torch.stack((detail(rebuilt.images), detail(images_BCHW))).double().sum(1).cpu(),
            "taken": codes.bincount(minlength=_codes(first_stage)),
        }

    def conditions(self) -> dict[str, Any]:
        """What a score depends on besides the weights."""
        return {
            "n": self._held_out.count,
            "reference": self._held_out.digest,
            "transform": jobs_config.to_plain(self._held_out.transform),
            "features": self._features.digest,
        }

    def identity(self, first_stage: FirstStage) -> dict[str, Any]:
        """Everything that the look at an image depends on besides the weights; plain values."""
        return {
            **self.conditions(),
            "evaluation": jobs_config.to_plain(self._config),
            "first_stage": jobs_config.to_plain(first_stage.config),
            "dtype": str(next(first_stage.parameters()).dtype),
        }


def _codes(first_stage: FirstStage) -> int:
    """Entries of its codebook; 0 where it has none."""
    config = first_stage.config
    return config.codebook_size if isinstance(config, AutoencoderVQConfig) else 0


def paused(parts: Iterator[Tensor], between: Between) -> Iterator[Tensor]:
    """The same parts, with `between` called after each is made."""
    for part in parts:
        between()
        yield part


@torch.no_grad()
def reconstruct(first_stage: FirstStage, images_BCHW: Tensor) -> Rebuilt:
    """Images encoded to the mean of their posterior and decoded, clamped to [-1, 1], all on one device."""
    under_zero = any(weight.dtype is torch.bfloat16 for weight in first_stage.parameters())
    with torch.autocast(images_BCHW.device.type, torch.bfloat16, enabled=under_zero):
        rebuilt = first_stage(images_BCHW, images_BCHW.new_zeros(()))
    return replace(rebuilt, images=rebuilt.images.float().clamp(-1, 1))


@torch.no_grad()
def latent_statistics(first_stage: FirstStage, held_out: HeldOutImages, batch: int) -> LatentStatistics:
    """Mean and standard deviation of the latents of all held-out images, `batch` at once, on the device of the job.

    All ranks share the work. Collective.
    """
    statistics: LatentStatistics | None = None
    for _, images, counts in held_out.shared(batch):
        moments = first_stage.encode(images.images.to(runtime.device()))
        statistics = statistics or LatentStatistics(str(moments.kind), first_stage.latent_channels)
        if counts:
            statistics.add(moments.pack().cpu().numpy())
    assert statistics is not None, "a set of images is not empty"
    first, *others = runtime.gathered(statistics)
    for other in others:
        first.merge(other)
    return first


def reconstruction_grid(
    first_stage: FirstStage, images_BCHW: Tensor, labels: Sequence[str], *, columns: int, title: str
) -> np.ndarray:
    """Rows of originals, each above the row of their reconstructions, which bear the labels; as `labelled_grid`."""
    images_BCHW = images_BCHW.to(runtime.device())
    rebuilt_BCHW = reconstruct(first_stage, images_BCHW).images
    rows, texts = list[Tensor](), list[str]()
    for row in ranges(len(labels), columns):
        part = slice(row.start, row.stop)
        rows += [images_BCHW[part], rebuilt_BCHW[part]]
        texts += [*["original"] * len(row), *labels[part]]
    pictures = to_uint8(torch.cat(rows)).permute(0, 2, 3, 1).cpu().numpy()
    return labelled_grid(pictures, texts, columns=columns, title=title)


def features_of(config: EvaluationConfig, paths: PathsConfig) -> Features:
    """The network that images are looked at with.

    raises  FileNotFoundError where its weights are not in paths.weights
    """
    match config.features:
        case FeatureNetwork.random:
            return RandomFeatures()
        case FeatureNetwork.inception:
            return InceptionFeatures(Path(paths.weights))
        case FeatureNetwork.inception_clean:
            return InceptionFeatures(Path(paths.weights), Resizing.clean)
        case FeatureNetwork.vgg16:
            return VggFeatures(vgg16_file(paths.weights))
