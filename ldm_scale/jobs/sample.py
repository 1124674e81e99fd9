"""Sample from a trained model, whatever its conditioning. `sample.py` starts this, alone or by `accelerate launch`.

Image i has its own noise stream, (seed, i), and batches are fixed by index: batch k is drawn by process k modulo their
number, so any number of processes writes the same files. A picture that is there is not drawn again.

Shape letters: B batch, C channels, H W height and width in pixels.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.spatial import NO_LABEL, LabelMapConfig
from ldm_scale.core import progress, runtime, storage, weights
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.shares import ranges
from ldm_scale.core.tensors import to_uint8
from ldm_scale.first_stage.loss import AutoencoderLossConfig, PerceptualKind, perceptual_network
from ldm_scale.images import fit
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading, requests
from ldm_scale.jobs.beside import Page
from ldm_scale.jobs.pictures import Pictures
from ldm_scale.jobs.requests import Kind, Request
from ldm_scale.jobs.schemas.sample import GuideDistance, SampleJob
from ldm_scale.latent_diffusion.generate import Distance, Generator, ImageGuide, Steering, l2
from ldm_scale.latent_diffusion.spatial_inputs import masked_image
from ldm_scale.samplers.base import Frame

log = runtime.logger(__name__)


def run(job: SampleJob) -> None:
    """Write one PNG for each picture that is asked for, named by its number, and a labelled grid.

    exits  0 done, 75 preempted
    """
    runtime.configure_logging()
    runtime.join()
    preemption = runtime.Preemption()
    source = _source(job)
    asked = requests.read(job, source.config.conditioning, source.first_stage.latent_channels)
    names = requests.class_names(job)
    size = _size(job, source, asked)
    artist = Artist(job, source.load(runtime.device()), size)
    who = [storage.digest({**artist.settings, "index": i, "asked": one.identity()}) for i, one in enumerate(asked)]
    pictures = Pictures(_folder(job, who), who)
    share = _share(len(asked), job.batch)
    _draw(artist, asked, share, pictures, preemption)
    if runtime.any_rank(any(pictures.lacking(batch) for batch in share)):
        log.info("stopped with %d of %d pictures; the same command goes on", pictures.count(), len(asked))
        runtime.leave(runtime.PREEMPTED_EXIT_CODE)
    if runtime.is_main():
        page = Page(
            conditioning=source.config.conditioning,
            small=artist.small,
            names=names,
            each=job.images_per_prompt,
        )
        pictures.write_grid(page.of(pictures, asked, artist.title))
        print(_closing(job, pictures, len(asked)))
    runtime.leave()


class Artist:
    """Draws batches of requests with one model."""

    def __init__(self, job: SampleJob, trained: loading.TrainedModel, size: tuple[int, int]) -> None:
        self._job, self._trained, self._size = job, trained, size
        self._device = next(trained.model.parameters()).device
        self._distance = _distance(job, self._device)
        self._kind = Kind.of(trained.model.config.conditioning, trained.first_stage.latent_channels)
        self._generator = Generator(
            model=trained.model,
            first_stage=trained.first_stage,
            latent_scale=trained.latent_scale,
            sampler=job.sampler,
            size=size,
            seed=job.seed,
            tiles=job.tiles.build(),
        )
        self.settings = self._settings()
        """All that decides a picture besides its own request, as JSON values."""

    @property
    def small(self) -> tuple[int, int]:
        """Height and width of the latent, and of the picture that super-resolution begins with."""
        factor = self._trained.first_stage.factor
        return self._size[0] // factor, self._size[1] // factor

    @property
    def title(self) -> str:
        """The model and the sampler, for the head of a grid."""
        sampler = self.settings["sampler"]
        how = f"{sampler['schema']}, {sampler['steps']} steps, guidance {sampler['guidance']:g}"
        return f"{self._trained.described}; {how}, seed {self._job.seed}"

    def draw(self, batch: Sequence[Request], indices: Sequence[int], watch: Callable[[Frame], None]) -> Tensor:
        """The pictures of some requests, (B, H, W, 3) uint8 on the CPU."""
        images_BCHW = self._generator.images(
            self._conditions(batch), indices, steering=self._steering(batch), watch=watch
        )
        if self._kind is Kind.masked_images:  # such a model also draws, less well, what is known
            known_BCHW, paint_B1HW = self._pictures(batch, "images"), self._masks(batch)
            images_BCHW = torch.lerp(known_BCHW, images_BCHW, paint_B1HW)
        return to_uint8(images_BCHW).permute(0, 2, 3, 1).cpu()

    def told(self, request: Request, index: int) -> dict[str, str]:
        """What a picture says of itself."""
        sampler = self._job.sampler
        values = {
            **request.described(),
            **self.settings,
            "index": index,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
            "model": f"{self._job.run_dir or self._job.model}: {self._trained.described}",
        }
        return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}

    def _settings(self) -> dict[str, Any]:
        job = self._job
        settings = {
            "seed": job.seed,
            "size": list(self._size),
            "sampler": jobs_config.to_plain(job.sampler),
            "weights_sha256": weights.digest(self._trained.model.state_dict()),
            "first_stage_sha256": self._trained.first_stage.digest(),
            "latent_scale": self._trained.latent_scale,
        }
        if job.start is not None:
            settings["strength"] = job.strength
        if job.guide.images is not None:
            settings["guide"] = {"scale": job.guide.scale, "distance": job.guide.distance.name}
        if (tiles := job.tiles.build()) is not None:
            settings["tiles"] = {"size": tiles.size, "overlap": tiles.overlap}
        return settings

    def _conditions(self, batch: Sequence[Request]) -> list[Any]:
        """What the conditioner prepares."""
        if self._kind is Kind.masked_images:
            images_BCHW, paint_B1HW = self._pictures(batch, "images"), self._masks(batch)
            return list(masked_image(self._trained.first_stage, self._trained.latent_scale, images_BCHW, paint_B1HW))
        if self._kind is Kind.low_resolution:
            return [fit.read_picture(one.files["low_resolution"], self.small) for one in batch]
        if self._kind is Kind.label_maps:
            told = self._trained.model.config.conditioning
            assert isinstance(told, LabelMapConfig)
            size = (self.small[0] << told.halvings, self.small[1] << told.halvings)
            return [
                fit.read_labels(one.files["label_maps"], size, classes=told.classes, no_label=NO_LABEL) for one in batch
            ]
        return [one.condition for one in batch]

    def _steering(self, batch: Sequence[Request]) -> Steering:
        files, job = batch[0].files, self._job
        inpainted = "images" in files and self._kind is not Kind.masked_images
        return Steering(
            start_BCHW=self._pictures(batch, "start") if "start" in files else None,
            strength=1.0 if job.strength is None else job.strength,
            known_BCHW=self._pictures(batch, "images") if inpainted else None,
            paint_B1HW=self._masks(batch) if inpainted else None,
            guide=self._guide(batch) if "guide.images" in files else None,
        )

    def _guide(self, batch: Sequence[Request]) -> ImageGuide:
        images = [fit.read_picture(one.files["guide.images"]) for one in batch]
        if len({image.shape for image in images}) > 1:
            raise ValueError("guide.images= has pictures of several sizes; make them one size")
        assert self._job.guide.scale is not None, "GuideConfig asks for both"
        return ImageGuide(
            images_BCHW=torch.stack(images).to(self._device), scale=self._job.guide.scale, distance=self._distance
        )

    def _pictures(self, batch: Sequence[Request], key: str) -> Tensor:
        return torch.stack([fit.read_picture(one.files[key], self._size) for one in batch]).to(self._device)

    def _masks(self, batch: Sequence[Request]) -> Tensor:
        return torch.stack([fit.read_mask(one.files["masks"], self._size) for one in batch]).to(self._device)


def _source(job: SampleJob) -> loading.ModelSource:
    if job.model is not None:
        return loading.ModelDirectory(Path(job.model))
    assert job.run_dir is not None, "SampleJob asks for one of the two"
    return loading.TrainingRun(RunDir(Path(job.run_dir)), name=job.checkpoint, which=job.weights)


def _size(job: SampleJob, source: loading.ModelSource, asked: Sequence[Request]) -> tuple[int, int]:
    """Height and width of the pictures, which the first stage can decode.

    raises  ValueError for others, or where nothing says them
    """
    factor = source.first_stage.factor
    if job.size is not None:
        height, width = job.size
    elif "low_resolution" in asked[0].files:
        height, width = (factor * side for side in requests.low_resolution_size(asked))
    elif source.size is not None:
        height = width = source.size
    else:
        raise ValueError(f"model={job.model} does not say what size it was trained at; give size=[HEIGHT,WIDTH]")
    source.first_stage.latent_shape(height, width)
    return height, width


def _distance(job: SampleJob, device: torch.device) -> Distance:
    """What guidance by a picture makes small."""
    if job.guide.distance is GuideDistance.l2:
        return l2
    try:
        network = perceptual_network(AutoencoderLossConfig(perceptual=PerceptualKind.lpips), job.paths.weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"guide.distance=lpips: {error}; guide.distance=l2 needs no weights") from error
    assert network is not None
    return network.to(device)


def _folder(job: SampleJob, who: list[str]) -> Path:
    """Where the pictures go: `out`, or a directory of this request's own beside the model."""
    if job.out is not None:
        return Path(job.out)
    return Path(str(job.run_dir or job.model)) / "samples" / storage.digest(who)[:8]


def _share(count: int, batch: int) -> list[range]:
    """The batches of this process, each the indices of its pictures."""
    return ranges(count, batch)[runtime.rank() :: runtime.world()]


def _draw(
    artist: Artist,
    asked: Sequence[Request],
    share: Sequence[range],
    pictures: Pictures,
    preemption: runtime.Preemption,
) -> None:
    """Draw every batch of `share` that is not all there, until this process is told to stop."""
    with progress.bar("sampling", len(asked), done=pictures.count()) as bar:
        for batch in share:
            if not (lacking := pictures.lacking(batch)):
                continue
            if preemption.received:
                return
            drawn_BHWC = artist.draw(
                [asked[i] for i in batch], batch, lambda frame: bar.advance(0, f"step {frame.done} of {frame.steps}")
            )
            for i in lacking:
                pictures.write(i, drawn_BHWC[i - batch.start].numpy(), artist.told(asked[i], i))
            bar.move(pictures.count())


def _closing(job: SampleJob, pictures: Pictures, count: int) -> str:
    lines = [
        f"\nsamples  {pictures.folder} (PNG: {count}; each says how it was made)",
        f"  grid   {pictures.grid}",
        "  more   the same command with seed=1, images_per_prompt=4, sampler.steps=100 ...",
    ]
    if job.run_dir is not None:
        lines.append(f"  score  python evaluate.py run_dir={job.run_dir}")
    return "\n".join(lines) + "\n"
