"""The two trainings of the paper, each as the parts that the loop is given: model, batches, step, scores, pictures.

Shape letters: N images in all, B images at once, C channels, H W height and width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_scale.conditioning.clip_text import CachedTextConditioner
from ldm_scale.core import runtime, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.shares import add_up, from_main, shared
from ldm_scale.core.tensors import to_uint8
from ldm_scale.data.cache import LatentCache, LatentStatistics, require_match, require_text
from ldm_scale.data.config import DataConfig, Origin
from ldm_scale.data.shards import ShardSet
from ldm_scale.data.sources import ImageBatch, OnBad, SampleSource
from ldm_scale.first_stage.base import FirstStage, MomentsKind
from ldm_scale.first_stage.loss import ReconstructionLoss, perceptual_network
from ldm_scale.first_stage.vq import AutoencoderVQConfig
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading
from ldm_scale.jobs.first_stage_cost import IMAGE_CHANNELS, Judges
from ldm_scale.jobs.kept import Between, Kept
from ldm_scale.jobs.precompute import identity
from ldm_scale.jobs.schemas.experiment import PROMPT_GUIDANCES
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.scores import (
    GenerationScores,
    HeldOutImages,
    ReconstructionScores,
    latent_statistics,
    paused,
    reconstruction_grid,
)
from ldm_scale.latent_diffusion.generate import Generator
from ldm_scale.latent_diffusion.model import LatentDiffusion
from ldm_scale.samplers.base import Frame
from ldm_scale.tracking.grid import labelled_grid, placed_grid
from ldm_scale.tracking.tracker import Tracker
from ldm_scale.training.adversary import DISCRIMINATOR, Adversary
from ldm_scale.training.codebook import CodebookWatch
from ldm_scale.training.ema import EMA
from ldm_scale.training.engine import Dtypes, Engine
from ldm_scale.training.intake import Given, Intake, Spread
from ldm_scale.training.optimizer import OptimizerConfig
from ldm_scale.training.steps import AutoencoderStep, CachedMoments, DiffusionStep, EncodedMoments, Step
from ldm_scale.training.throughput import training_flops
from ldm_scale.training.validation import VALIDATED, HeldOut

log = runtime.logger(__name__)

_LAST = "decoder.conv_out.weight"  # the decoder's last layer, by the name that it has in every first stage
_EATEN = 16  # samples shown as the model was given them
_PROGRESSIVE_ROWS, _PROGRESSIVE_COLUMNS = 4, 6  # pictures of how a sample came about: captions, moments


class Stage(ABC):
    """One training: what is trained, on which batches, how it is scored and shown."""

    _job: TrainJob
    module: FirstStage | LatentDiffusion
    """What the engine trains."""
    source: SampleSource[Any]
    """Where batches come from."""
    intake: Intake
    """What the model is given of them."""

    def prepare(self, engine: Engine, optimizer: OptimizerConfig) -> None:
        """Give the engine all that trains."""
        engine.prepare(self.module, optimizer)

    @abstractmethod
    def match(self, dtypes: Dtypes) -> None:
        """Look at `module` in the number types of an engine that is not there."""

    @abstractmethod
    def step(self, engine: Engine, ema: EMA) -> Step[Any]:
        """What the loop calls for each micro batch; after `prepare`."""

    @abstractmethod
    def validate(self, between: Between, suffix: str) -> dict[str, float]:
        """Loss of `module` as it is now, on held-out images; names begin with `val/loss{suffix}`. Collective."""

    @abstractmethod
    def evaluate(self, between: Between, kept: Kept) -> dict[str, float]:
        """Scores of `module` as it is now, on held-out images. Collective."""

    @abstractmethod
    def conditions(self) -> dict[str, Any]:
        """What these scores depend on besides the weights."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that they and what is kept of them depends on besides the weights."""

    @abstractmethod
    def show(self, images_seen: int, tracker: Tracker, between: Between) -> None:
        """Pictures of `module` as it is now; all of them, or none where `between` raises."""

    def _show_eaten(self, images_seen: int, tracker: Tracker, decode: Callable[[Tensor], Tensor]) -> None:
        """The newest samples as the model was given them, on rank 0; nothing before the first step of a launch.

        decode  samples to images in [-1, 1]
        """
        given = self.intake.newest()
        if given is None or not runtime.is_main():
            return
        images_BCHW = torch.cat([decode(part) for part in given.samples.split(self._job.evaluation.batch)])
        pictures = to_uint8(images_BCHW).permute(0, 2, 3, 1).cpu().numpy()
        title = f"given up to image {images_seen:,}"
        grid = labelled_grid(pictures, self.eaten_labels(given), title=title)
        tracker.images(images_seen, "samples/eaten", grid, "what the model was given, without noise")

    def eaten_labels(self, given: Given) -> list[str]:
        """The key of each sample, and what the model was told with it."""
        return given.keys

    @abstractmethod
    def prompted(self, title: str, between: Between) -> np.ndarray | None:
        """Fixed captions at several strengths of guidance, by `module` as it is now; None where there are none.

        All ranks share the work. Collective.
        """

    @abstractmethod
    def baseline(self) -> dict[str, float]:
        """Scores that training cannot change, logged once."""

    @abstractmethod
    def flops_per_image(self) -> float:
        """Operations to train on one image."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must carry besides weights and images seen."""
        return {"order_id": self.source.order_id, "order": self.source.order.state()}

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state, but not where its stream of samples was another one.

        raises  ValueError naming both sides
        """
        if state["order_id"] != self.source.order_id:
            raise ValueError(
                f"the checkpoint read samples {state['order_id'][:12]}, this run has {self.source.order_id[:12]}: "
                "shards or keys were added, taken away or renamed, or data.selection is another. Restore them, or "
                "start another run: name=ANOTHER_NAME"
            )
        self.source.order.require_same(state["order"])

    @abstractmethod
    def publish(self, tensors: dict[str, Tensor] | None, run_dir: RunDir) -> None:
        """Write the final weights, which rank 0 has, where other jobs look for them. Collective."""


class AutoencoderStage(Stage):
    """First stage: images to latents and back."""

    def __init__(self, job: TrainJob, device: torch.device, on_bad: OnBad) -> None:
        self._job = job
        shards = open_images(job.data)
        self._held_out = HeldOutImages.open(job.data, job.evaluation.images)
        self.source = job.data.image_source(shards, job.seed, on_bad=on_bad)
        self.intake = Intake(shown=_EATEN)
        self.module: FirstStage = job.first_stage.build()
        perceptual = perceptual_network(job.autoencoder_loss, job.paths.weights)
        self._loss = ReconstructionLoss(job.autoencoder_loss, None if perceptual is None else perceptual.to(device))
        self._scores = ReconstructionScores(job.evaluation, job.paths, self._held_out, device)

    def prepare(self, engine: Engine, optimizer: OptimizerConfig) -> None:
        """The autoencoder; beside it the discriminator and the learnt variance, where the loss has them."""
        Stage.prepare(self, engine, optimizer)
        adversarial = self._job.autoencoder_loss.adversarial
        if adversarial.exists:
            ratio = adversarial.learning_rate_ratio
            engine.accompany(DISCRIMINATOR, adversarial.build(IMAGE_CHANNELS), optimizer, learning_rate_ratio=ratio)
        if self._loss.variance is not None:
            engine.accompany("variance", self._loss.variance, optimizer)

    def step(self, engine: Engine, ema: EMA) -> Step[Any]:
        loss, seed = self._job.autoencoder_loss, self._job.seed
        codebook = adversary = None
        if isinstance(self._job.first_stage, AutoencoderVQConfig):
            window, restart = loss.codebook_window, loss.restart_codes
            codebook = CodebookWatch(engine, ema, window=window, restart=restart, seed=seed)
        if loss.adversarial.exists:
            adversary = Adversary(engine, loss.adversarial, self.module.get_parameter(_LAST))
        shape = self._job.first_stage.latent_shape(self._job.data.transform.size)
        return AutoencoderStep(
            engine, loss=self._loss, latent_shape=shape, seed=seed, codebook=codebook, adversary=adversary,
            intake=self.intake,
        )  # fmt: skip

    def match(self, dtypes: Dtypes) -> None:
        self.module.to(dtypes.parameter)

    def validate(self, between: Between, suffix: str) -> dict[str, float]:
        """Its scores say it all."""
        return {}

    def evaluate(self, between: Between, kept: Kept) -> dict[str, float]:
        return self._scores(self.module, between, kept).scores

    def conditions(self) -> dict[str, Any]:
        return self._scores.conditions()

    def identity(self) -> dict[str, Any]:
        return self._scores.identity(self.module)

    def show(self, images_seen: int, tracker: Tracker, between: Between) -> None:
        """Originals above their reconstructions."""
        images_BCHW = self._held_out.read(range(min(self._job.evaluation.grid // 2, self._held_out.count))).images
        labels, title = ["reconstruction"] * len(images_BCHW), f"after {images_seen:,} images"
        grid = reconstruction_grid(self.module, images_BCHW, labels, columns=len(images_BCHW), title=title)
        self._show_eaten(images_seen, tracker, lambda images_BCHW: images_BCHW)
        tracker.images(images_seen, "samples/reconstructions", grid, "held-out images above their reconstructions")

    def prompted(self, title: str, between: Between) -> np.ndarray | None:
        return None

    def baseline(self) -> dict[str, float]:
        return {}

    def flops_per_image(self) -> float:
        """Of the autoencoder and of what judges it, as in steps from the discriminator's start on: fewer before it."""
        size = self._job.data.transform.size
        with torch.device("meta"):
            network = self._job.first_stage.build()
            images, noise = torch.empty(1, 3, size, size), torch.empty(1, *self._job.first_stage.latent_shape(size))
        return training_flops(lambda: network(images, noise), images=1) + Judges(self._job.autoencoder_loss).flops(size)

    def publish(self, tensors: dict[str, Tensor] | None, run_dir: RunDir) -> None:
        network = self._job.first_stage.build()
        if tensors is not None:
            weights.load_exactly(network, tensors, str(run_dir.weights))
        network = network.to(runtime.device()).eval()
        from_main(network.state_dict().values())
        found = latent_statistics(network, self._held_out, self._job.evaluation.batch)
        if tensors is None:
            return
        latents = {
            "images": self._held_out.count, "data": self._held_out.digest, "mean": found.mean, "std": found.std,
            "channel_mean": found.channel_mean, "channel_std": found.channel_std,
        }  # fmt: skip
        plain = jobs_config.to_plain(self._job.first_stage)
        weights.save(run_dir.weights, {"first_stage": plain, loading.LATENTS: latents}, tensors)


class DiffusionStage(Stage):
    """Second stage: a diffusion model on latents of a frozen first stage, cached or encoded in every step.

    A frozen text encoder is outside of it too: its output is cached with the latents.
    """

    def __init__(self, job: TrainJob, device: torch.device, on_bad: OnBad, between: Between) -> None:
        self._job = job
        is_cached = job.data.source is Origin.latents
        caches = job.data.open_latents() if is_cached else {}
        shards = {} if is_cached else open_images(job.data)
        loading.first_stage_weights(job.first_stage)
        self._held_out = HeldOutImages.open(job.data, job.evaluation.images)
        self._first_stage = loading.first_stage(job.first_stage).to(device)
        self._text_encoder = loading.text_encoder(job.conditioning)
        self.module: LatentDiffusion = job.latent_diffusion.build_trained()
        prepare = None if self.module.conditioner is None else self.module.conditioner.read
        if self._text_encoder is not None and isinstance(self.module.conditioner, CachedTextConditioner):
            self.module.conditioner.use(self._text_encoder.to(device))
            prepare = None
        if is_cached:
            kind = self._kind_of(list(caches.values()))
            self._moments: CachedMoments | EncodedMoments = CachedMoments(kind)
            embedded = self._text_encoder is not None
            self.source = job.data.latent_source(caches, job.seed, prepare, on_bad, text=embedded)
            mean, std = latent_spread(list(caches.values()), job.data.weights)
        else:
            self._moments = encoded = EncodedMoments(self._first_stage)
            self.source = images = job.data.image_source(shards, job.seed, prepare, on_bad)
            mean, std = self._spread_of_first_batch(encoded, images, device)
        scale = scale_of_latents(job.first_stage.scale or loading.stated_scale(job.first_stage), std)
        z_0_NCHW = torch.zeros(min(self._held_out.count, VALIDATED), *self._latent_shape)

        @torch.no_grad()
        def encode(indices: range, images_BCHW: Tensor) -> None:
            if len(rows := z_0_NCHW[indices.start : indices.stop]):
                rows.copy_(self._first_stage.encode(images_BCHW[: len(rows)].to(device)).mean)

        self._scores = GenerationScores(job.evaluation, job.paths, self._held_out, device, between, encode)
        add_up(z_0_NCHW)
        conditioner = self.module.conditioner
        inputs = None if conditioner is None else conditioner.prepare(self._scores.captions[: len(z_0_NCHW)])
        self._unscaled = Spread(mean, std), HeldOut(z_0_NCHW, inputs, job.seed, job.evaluation.batch)
        self._scale_latents(scale)

    def _scale_latents(self, scale: float) -> None:
        """From here on the model is given latents times `scale`."""
        spread, held_out = self._unscaled
        self._latent_scale = scale
        expected = Spread(spread.mean * scale, spread.std * scale)
        self.intake = Intake(shown=_EATEN, expected=expected, conditioner=self.module.conditioner)
        self._validation = replace(held_out, z_0_NCHW=(held_out.z_0_NCHW * scale).to(runtime.device()))

    def resume(self, state: dict[str, Any]) -> None:
        """And not on another first stage or text encoder. Latents are scaled as they were.

        Their scale may have been measured on the first global batch, which is another where its size was amended.
        """
        Stage.resume(self, state)
        loading.require_trained_on("the checkpoint", state, self._first_stage, self._text_encoder)
        self._scale_latents(state["latent_scale"])

    def _kind_of(self, caches: Sequence[LatentCache]) -> MomentsKind:
        """What the moments of all caches are.

        raises  ValueError where one was made by another first stage, transform or text encoder
        """
        wanted = identity(self._job, self._first_stage, self._text_encoder)
        for cache in caches:
            require_match(
                cache.manifest, wanted.fingerprint, wanted_first_stage=wanted.first_stage["sha256"], where=cache.folder
            )
            if wanted.text is not None:
                require_text(cache, wanted.text)
        return MomentsKind(wanted.kind)

    def _spread_of_first_batch(
        self, encoded: EncodedMoments, source: SampleSource[ImageBatch], device: torch.device
    ) -> tuple[float, float]:
        """Mean and standard deviation of the latents of the first global batch (Rombach et al. 2022, appendix G)."""
        config, batch = self._job.first_stage, self._job.evaluation.batch
        statistics: LatentStatistics | None = None
        for positions in np.split(np.arange(self._job.global_batch), range(batch, self._job.global_batch, batch)):
            moments = encoded(source.read(positions), device)
            if statistics is None:
                statistics = LatentStatistics(str(moments.kind), config.latent_channels)
            statistics.add(moments.pack().cpu().numpy())
        assert statistics is not None
        return statistics.mean, statistics.std

    def prepare(self, engine: Engine, optimizer: OptimizerConfig) -> None:
        Stage.prepare(self, engine, optimizer)
        self.module.compute_dtype = engine.compute_dtype

    def match(self, dtypes: Dtypes) -> None:
        self.module.use_dtypes(parameter=dtypes.parameter, compute=dtypes.compute)

    def step(self, engine: Engine, ema: EMA) -> Step[Any]:
        return DiffusionStep(
            engine,
            conditioner=self.module.conditioner,
            moments=self._moments,
            latent_scale=self._latent_scale,
            diffusion=self.module.config.diffusion,
            seed=self._job.seed,
            intake=self.intake,
        )

    def validate(self, between: Between, suffix: str) -> dict[str, float]:
        return self._validation.loss(self.module, between, suffix)

    def evaluate(self, between: Between, kept: Kept) -> dict[str, float]:
        return self._scores(self._generator(), between, kept)

    def conditions(self) -> dict[str, Any]:
        return self._scores.conditions(self._generator())

    def identity(self) -> dict[str, Any]:
        return self._scores.identity(self._generator())

    def show(self, images_seen: int, tracker: Tracker, between: Between) -> None:
        """Held-out captions, always the same ones from the same noise; of the first few, also how they came about."""
        captions = self._scores.captions[: self._job.evaluation.grid]
        drawn = paused(self._generator().batches(captions, self._job.evaluation.batch), between)
        images_BCHW = torch.cat([part.cpu() for part in drawn])
        pictures = to_uint8(images_BCHW).permute(0, 2, 3, 1).numpy()
        columns = max(1, round(len(captions) ** 0.5))
        title = f"after {images_seen:,} images"
        grid, places = placed_grid(pictures, captions, columns=columns, title=title)
        rows = self._progressive(captions[:_PROGRESSIVE_ROWS], title)
        how = {"guidance": self._job.sampler.guidance, "weights": f"ema/{self._job.ema_half_lives[0]}"}
        cells = [(place, {"prompt": caption, **how}) for place, caption in zip(places, captions, strict=True)]
        tracker.images(images_seen, "samples/grid", grid, "held-out captions, fixed noise, averaged weights", cells)
        tracker.images(images_seen, "samples/progressive", rows, "what the sampler headed for, early to late")
        self._show_eaten(images_seen, tracker, self._generator().decode)

    def eaten_labels(self, given: Given) -> list[str]:
        if self.module.conditioner is None or given.told is None:
            return given.keys
        told = self.module.conditioner.in_words(given.told, given.captions)
        return [f"{key}: {words or '(empty)'}" for key, words in zip(given.keys, told, strict=True)]

    def prompted(self, title: str, between: Between) -> np.ndarray | None:
        """A row for each caption, a column for each strength; the noise is the caption's, the same everywhere."""
        families = self._job.prompts
        captions = [caption for family in families.values() for caption in family]
        if not captions:
            return None
        begins = [0, *accumulate(len(family) for family in families.values())]
        rows, side = [range(*ends) for ends in pairwise(begins)], self._job.data.transform.size
        pictures_NGHWC = torch.zeros(
            len(captions), len(PROMPT_GUIDANCES), side, side, IMAGE_CHANNELS, dtype=torch.uint8
        )
        for column, guidance in enumerate(PROMPT_GUIDANCES):
            generator = self._generator()
            generator = replace(generator, sampler=replace(generator.sampler, guidance=guidance))
            for own, counts in shared(rows):  # of one strength at once: under zero3 every forward pass is collective
                between()
                images_BCHW = generator.images(captions[own.start : own.stop], own)
                if counts:
                    pictures_NGHWC[own.start : own.stop, column] = to_uint8(images_BCHW).permute(0, 2, 3, 1).cpu()
        add_up(pictures_NGHWC)
        strengths = [f"guidance {guidance:g}" for guidance in PROMPT_GUIDANCES]
        named = [f"{family}: {caption}" for family, captions in families.items() for caption in captions]
        labels = [label for name in named for label in (name, *strengths[1:])]
        title = f"{title}; {strengths[0]}, then stronger"
        return labelled_grid(pictures_NGHWC.flatten(0, 1).numpy(), labels, columns=len(strengths), title=title)

    def _progressive(self, captions: list[str], title: str) -> np.ndarray:
        """A row for each caption: the estimates of z_0, decoded, at evenly spread steps."""
        generator, frames = self._generator(), list[Frame]()
        steps = generator.sampler.steps
        shown = {max(1, round(steps * column / _PROGRESSIVE_COLUMNS)) for column in range(1, _PROGRESSIVE_COLUMNS + 1)}

        def watch(frame: Frame) -> None:
            if frame.done in shown:
                frames.append(frame)

        generator.images(captions, range(len(captions)), watch=watch)
        columns_BCHW = [to_uint8(generator.decode(frame.z_0)).cpu() for frame in frames]
        pictures = torch.stack(columns_BCHW, dim=1).flatten(0, 1).permute(0, 2, 3, 1).numpy()
        labels = [
            label for caption in captions for label in (*(f"step {frame.done}" for frame in frames[:-1]), caption)
        ]
        return labelled_grid(pictures, labels, columns=len(frames), title=title)

    def baseline(self) -> dict[str, float]:
        return self._scores.real()

    def flops_per_image(self) -> float:
        with torch.device("meta"):
            model = self._job.latent_diffusion.build_trained()
            z, t = torch.empty(1, *self._latent_shape), torch.zeros(1, dtype=torch.int64)
            inputs = (
                None
                if self._validation.inputs is None
                else torch.empty_like(self._validation.inputs[:1], device="meta")
            )
        return training_flops(lambda: model.network(z, t, **model.conditions(inputs)), images=1)

    def state(self) -> dict[str, Any]:
        encoder = self._text_encoder
        return {
            **Stage.state(self),
            "latent_scale": self._latent_scale,
            "first_stage_sha256": self._first_stage.digest(),
            **({} if encoder is None else {"text_encoder_sha256": encoder.digest()}),
        }

    def publish(self, tensors: dict[str, Tensor] | None, run_dir: RunDir) -> None:
        if tensors is None:
            return
        if self._text_encoder is not None:  # so that the directory is a whole model
            frozen = self._text_encoder.state_dict().items()
            tensors = tensors | {f"conditioner.{name}": tensor for name, tensor in frozen}
        plain = jobs_config.to_plain(self._job.latent_diffusion)
        weights.save(run_dir.weights, {"latent_diffusion": plain, "latent_scale": self._latent_scale}, tensors)

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return self._job.first_stage.latent_shape(self._job.data.transform.size)

    def _generator(self) -> Generator:
        side = self._job.data.transform.size
        return Generator(
            model=self.module,
            first_stage=self._first_stage,
            latent_scale=self._latent_scale,
            sampler=self._job.sampler,
            size=(side, side),
            seed=self._job.seed,
        )


def stage_of(job: TrainJob, device: torch.device, on_bad: OnBad, between: Between = lambda: None) -> Stage:
    """The training that a job asks for. Collective.

    between  called between batches of held-out images, by all ranks together
    """
    return (
        AutoencoderStage(job, device, on_bad)
        if job.trains_first_stage
        else DiffusionStage(job, device, on_bad, between)
    )


def open_images(data: DataConfig) -> dict[str, ShardSet]:
    """The image shards, by name of their source. Says what they hold that is not read.

    raises  as `DataConfig.open_images`
    """
    opened = data.open_images()
    for name, shards in opened.items():
        if reasons := ", ".join(f"{reason} {count:,}" for reason, count in shards.rejected.items()):
            log.warning("%s: %s samples are read; left out: %s", name, f"{shards.n:,}", reasons)
    return opened


def scale_of_latents(configured: float | None, std: float) -> float:
    """What latents of this standard deviation are multiplied by.

    configured  the configured scale, or that of the weights; None for 1 / std
    raises      ValueError where it leaves latents far from unit variance
    """
    scale = configured or 1 / std
    if not 0.5 < scale * std < 2:
        raise ValueError(
            f"a latent scale of {scale:g} (first_stage.scale, or if that is null what the weights say) makes latents "
            f"of standard deviation {scale * std:.3g}, since theirs is {std:.4g}; between 0.5 and 2 is right. "
            f"Another first stage's scale? first_stage.scale={1 / std:.4g} fits"
        )
    return scale


def latent_spread(caches: Sequence[LatentCache], weights: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of the latents of several caches together, each as often as its weight says."""
    if len(caches) == 1:
        return caches[0].manifest.latent_mean, caches[0].manifest.latent_std
    shares = np.array(weights) / sum(weights)
    means = np.array([cache.manifest.latent_mean for cache in caches])
    stds = np.array([cache.manifest.latent_std for cache in caches])
    return float(shares @ means), float(np.sqrt(shares @ (stds**2 + means**2) - (shares @ means) ** 2))
