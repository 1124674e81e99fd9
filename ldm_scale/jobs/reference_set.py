"""Statistics of a reference set, written once: what `evaluation.reference=FILE` compares generated images to.

From image shards, or from a folder of images as it is; prepared as the loader prepares what a model is trained on. The
file says how, so that scores refuse a reference of another size, crop or network. `evaluate.py write_reference=FILE`
starts this. All ranks share the work.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.core.shares import ranges
from ldm_scale.core.tensors import from_uint8
from ldm_scale.data.config import DataConfig
from ldm_scale.data.index import IMAGE_FIELDS
from ldm_scale.data.samples import Task
from ldm_scale.data.sources import ImageBatch
from ldm_scale.evaluation.statistics import Collector, Score, save_reference
from ldm_scale.images.decode import UndecodableImage, decode
from ldm_scale.images.resize import ImageTransform, ImageTransformConfig, RejectedImage
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import loading
from ldm_scale.jobs.kept import Between, Kept, Result, kept_beside, results
from ldm_scale.jobs.schemas.evaluate import EvaluateJob
from ldm_scale.jobs.scores import HeldOutImages, features_of


def write(job: EvaluateJob, file: Path, between: Between = lambda: None) -> None:
    """Look at every image of the set, and write the file; broken off and called again, go on. Collective.

    raises  FileNotFoundError where there are no images, ValueError where one of a folder cannot be read
    """
    data = _data(job)
    images = open_images(data)
    features = features_of(job.evaluation, job.paths).to(runtime.device())
    scores = [score for score in job.evaluation.scores if score is not Score.inception_score]  # of generated images
    collector = Collector(features, images.count, scores)
    batch, transform = job.evaluation.batch, jobs_config.to_plain(images.transform)
    identity = {"features": features.digest, "transform": transform, "images_digest": images.digest}

    def seen(part: range) -> Result:
        return {"features": collector.look(images.read(part).images)}

    with kept_beside(file) as folder:
        kept = Kept(folder, {**identity, "batch": batch})
        for part, result in results(ranges(images.count, batch), seen, between, kept):
            collector.add(part.start, result["features"])
        statistics = collector.finish()
        if runtime.is_main():
            save_reference(file, statistics, {**identity, "images": data.validation})
    if runtime.is_main():
        print(f"{images.count:,} images of {data.validation}, {features.name}, transform {transform}")
        print(f"{file}: sha256 {storage.sha256_file(file)}; compare to it by evaluation.reference={file}")


def _data(job: EvaluateJob) -> DataConfig:
    """What to look at, as `validation`, and how it is prepared: as the run does, or at data.size in the usual way."""
    if job.run_dir is None:
        assert job.data.size is not None, "EvaluateJob checks it"
        data = DataConfig(transform=ImageTransformConfig(size=job.data.size), task=Task.unconditional)
    else:
        data = loading.RunWeights(RunDir(Path(job.run_dir)), name=job.checkpoint, which=job.weights).data
    return replace(data, validation=job.data.images or data.validation, task=Task.unconditional)


def open_images(data: DataConfig) -> HeldOutImages:
    """All images of `data.validation`: of shards, or below a folder in which there are none."""
    folder = Path(data.validation or "")
    if not data.validation or not folder.is_dir() or any(folder.glob("*.tar")):
        return HeldOutImages.open(data, None)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_FIELDS)
    if not files:
        raise FileNotFoundError(f"data.images={folder} holds neither shards (*.tar) nor images ({IMAGE_FIELDS})")
    digest = storage.digest([(str(path.relative_to(folder)), storage.sha256_file(path)) for path in files])
    transform = data.transform.fixed
    return HeldOutImages(ImageFiles(files, transform.build(), data.threads), len(files), digest, transform)


class ImageFiles:
    """Images in files, read as `ImageSource` reads those of shards."""

    def __init__(self, files: Sequence[Path], transform: ImageTransform, threads: int) -> None:
        self._files, self._transform = files, transform
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def read(self, positions: np.ndarray) -> ImageBatch:
        """The files of these numbers, without captions.

        raises  ValueError naming a file that cannot be read
        """
        files = [self._files[position] for position in positions]
        images_BCHW = torch.stack(list(self._pool.map(self._one, files)))
        keys, captions = [path.name for path in files], [""] * len(files)
        return ImageBatch(torch.from_numpy(positions), keys, captions, images_BCHW, None)

    def _one(self, path: Path) -> Tensor:
        try:
            pixels = self._transform(decode(path.read_bytes()))
        except (UndecodableImage, RejectedImage) as error:
            raise ValueError(f"{path}: {error}; take it out of the reference set, or mend it") from error
        return from_uint8(torch.from_numpy(pixels)).permute(2, 0, 1)
