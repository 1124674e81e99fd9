"""Where a training's samples are, which of them count and how they are read: what to configure, and its opening."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from ldm_scale.data.cache import LatentCache
from ldm_scale.data.captions import CaptionOverlay, CaptionsConfig
from ldm_scale.data.mixture import preset_mixture
from ldm_scale.data.order import Order, OrderPreset, preset_order
from ldm_scale.data.remote import RemoteReader, TarCache
from ldm_scale.data.samples import Task
from ldm_scale.data.shards import ShardSet
from ldm_scale.data.sources import (
    AnyBatch,
    ImageBatch,
    ImageSource,
    LatentBatch,
    LatentSource,
    MixedSource,
    OnBad,
    Prepare,
    SampleSource,
)
from ldm_scale.images.resize import ImageTransformConfig

Store = TypeVar("Store", LatentCache, ShardSet)
Batch = TypeVar("Batch", bound=AnyBatch)


class Origin(Enum):
    """Where the latents of a second stage come from."""

    latents = "latents"
    """A cache: each image was encoded once."""
    images = "images"
    """Image shards, encoded in every step: random crops and flips, no cache; costs the encoder's time each time."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One data set, as a training sees it."""

    images: str | None = None
    """Image shards: directory, brace range, glob, list file or tar; local or remote; several joined by `::`."""
    latents: str | None = None
    """Latent cache: its directory, or some of its tars; local or remote."""
    selection: list[str] = field(default_factory=list)
    """Parquet files that data_tools.filter and data_tools.dedup write: the samples count that all of them name."""
    removed: list[str] = field(default_factory=list)
    """Lists of samples never to be read (JSON lines), beside the data set's own `.ldm/removed.jsonl`, if it has one."""
    captions: CaptionsConfig = field(default_factory=CaptionsConfig)
    """Captions that take the place of those in the shards."""


@dataclass(kw_only=True, slots=True)
class MixedSourceConfig(SourceConfig):
    """One of several data sets."""

    weight: float
    """How often it is read beside the others, in any unit."""


@dataclass(kw_only=True, slots=True)
class DataConfig(SourceConfig):
    """All data of an experiment."""

    source: Origin = Origin.latents
    """What a second stage reads; a first stage reads images."""
    mixture: dict[str, MixedSourceConfig] = field(default_factory=dict)
    """Several data sets by name, read in turns by weight, in place of `images` and `latents`."""
    validation: str | None = None
    """Held-out image shards, of which scores and sample grids are made; never trained on."""
    index_dir: str | None = None
    """Folder for indexes and manifests of sources that are remote or read-only; None puts them beside the shards."""
    cache_dir: str | None = None
    """Folder on a local disk that remote tars are fetched into, whole; None reads them by blocks, kept in memory."""
    cache_gb: float = 100.0
    """Gigabytes of tars in `cache_dir`, for all processes of the host; the least recently used ones make room."""
    blocks_gb: float = 2.0
    """Memory for blocks of remote tars, in gigabytes, per process and data set. At best it holds a window of the order,
    of which a process reads 1 / world."""
    transform: ImageTransformConfig
    """How an image becomes what the first stage sees."""
    mirror: bool = False
    """Read the cached latent of each image or of its mirror image, by chance; the cache must hold both."""
    task: Task = Task.text
    """What a sample must have beside its image."""
    order: OrderPreset = OrderPreset.random_access
    """How far apart samples may lie that are read together: random_access for local disks, window for network ones."""
    max_bad_share: float = 0.01
    """Share of samples, 0 to 1, that may be unreadable before the job stops."""
    threads: int = 4
    """Threads that decode images, per process."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share={self.max_bad_share}; a share, 0 to 1")
        if self.threads < 1:
            raise ValueError(f"data.threads={self.threads}; at least 1")
        if min(self.cache_gb, self.blocks_gb) <= 0:
            raise ValueError(f"data.cache_gb={self.cache_gb}, data.blocks_gb={self.blocks_gb}; gigabytes, above 0")
        if self.mirror and self.source is Origin.images:
            raise ValueError("data.mirror=true is for cached latents; with data.source=images set data.transform.flip")
        if self.mixture and (self.selection or self.captions.file):
            given = "selection" if self.selection else "captions"
            raise ValueError(f"data.{given} beside data.mixture: set data.mixture.NAME.{given}, for one of its sources")
        _require_no_pipe("data.validation", self.validation)
        for name, part in {"data": self, **{f"data.mixture.{key}": part for key, part in self.mixture.items()}}.items():
            _require_no_pipe(f"{name}.images", part.images)
            _require_no_pipe(f"{name}.latents", part.latents)
        for name, part in self.mixture.items():
            if not 0 < part.weight < float("inf"):
                raise ValueError(f"data.mixture.{name}.weight={part.weight}; above 0: leave the source out instead")

    def open_images(self) -> dict[str, ShardSet]:
        """The image shards, indexed if need be, by name of their source.

        raises  ValueError or FileNotFoundError naming the key and the path
        """
        return {name: self._open_images(key, part) for name, (key, part) in self._parts.items()}

    def open_validation(self) -> ShardSet:
        """The held-out image shards, indexed if need be.

        raises  ValueError or FileNotFoundError naming the key and the path
        """
        if not self.validation:
            raise ValueError("data.validation is not set: give held-out image shards, for scores and sample grids")
        try:
            shards = ShardSet.open(self.validation, self.index_dir, require=self.task.require, remote=self._remote())
        except FileNotFoundError as error:
            raise FileNotFoundError(f"data.validation, of held-out images for scores: {error}") from error
        return shards.view(removed=self.removed)

    def open_latents(self) -> dict[str, LatentCache]:
        """The latent caches, by name of their source.

        raises  ValueError or FileNotFoundError naming the key and the path
        """
        return {name: self._open_latents(key, part) for name, (key, part) in self._parts.items()}

    @property
    def weights(self) -> list[float]:
        """Of the sources, in the order of their names."""
        return [part.weight for _, part in sorted(self.mixture.items())] or [1.0]

    def order_of(self, n: int, seed: int) -> Order:
        """The order in which `n` samples are read."""
        return preset_order(self.order, n=n, seed=seed)

    def image_source(
        self,
        shards: Mapping[str, ShardSet],
        seed: int,
        prepare: Prepare | None = None,
        on_bad: OnBad | None = None,
    ) -> SampleSource[ImageBatch]:
        """The stream of images of what `open_images` has opened."""
        transform = self.transform.build()

        def read(images: ShardSet, order: Order, captions: CaptionOverlay | None) -> SampleSource[ImageBatch]:
            return ImageSource(
                images,
                order,
                transform,
                seed,
                prepare,
                captions=captions,
                task=self.task,
                threads=self.threads,
                max_bad_share=self.max_bad_share,
                on_bad=on_bad,
            )

        return self._stream(shards, read, seed)

    def latent_source(
        self,
        caches: Mapping[str, LatentCache],
        seed: int,
        prepare: Prepare | None = None,
        on_bad: OnBad | None = None,
        *,
        text: bool = False,
    ) -> SampleSource[LatentBatch]:
        """The stream of latents of what `open_latents` has opened; with `text`, of embeddings of captions too."""

        def read(cache: LatentCache, order: Order, captions: CaptionOverlay | None) -> SampleSource[LatentBatch]:
            return LatentSource(
                cache,
                order,
                prepare,
                captions=captions,
                mirror=self.mirror,
                text=text,
                max_bad_share=self.max_bad_share,
                on_bad=on_bad,
            )

        return self._stream(caches, read, seed)

    def _stream(
        self,
        stores: Mapping[str, Store],
        read: Callable[[Store, Order, CaptionOverlay | None], SampleSource[Batch]],
        seed: int,
    ) -> SampleSource[Batch]:
        overlays = [part.captions.open(self.index_dir, seed) for _, part in self._parts.values()]
        sizes = [store.n for store in stores.values()]
        if not self.mixture:
            return read(next(iter(stores.values())), self.order_of(sizes[0], seed), overlays[0])
        mixture = preset_mixture(self.order, sizes=sizes, weights=self.weights, seed=seed)
        sources = map(read, stores.values(), mixture.orders, overlays)
        return MixedSource(dict(zip(stores, sources, strict=True)), mixture)

    @property
    def _parts(self) -> dict[str, tuple[str, SourceConfig]]:
        """The sources by name, in order, each with its key in the configuration."""
        if not self.mixture:
            return {"data": ("data", self)}
        return {name: (f"data.mixture.{name}", part) for name, part in sorted(self.mixture.items())}

    def _open_images(self, key: str, part: SourceConfig) -> ShardSet:
        if not part.images:
            raise ValueError(f"{key}.images is not set: give a directory, brace range, glob or list of image shards")
        shards = ShardSet.open(part.images, self.index_dir, require=self.task.require, remote=self._remote())
        return shards.view(part.selection, self._removed(part))

    def _open_latents(self, key: str, part: SourceConfig) -> LatentCache:
        if not part.latents:
            raise ValueError(f"{key}.latents is not set: give the directory that precompute_latents wrote")
        cache = LatentCache.open(part.latents, self.index_dir, self._remote())
        return cache.view(part.selection, self._removed(part))

    def _remote(self) -> RemoteReader:
        cache = None if self.cache_dir is None else TarCache(self.cache_dir, self.cache_gb)
        return RemoteReader(cache=cache, blocks_gb=self.blocks_gb)

    def _removed(self, part: SourceConfig) -> Sequence[str]:
        """What `data.removed` lists must not be read from any source."""
        return [*dict.fromkeys([*self.removed, *part.removed])]


def _require_no_pipe(key: str, source: str | None) -> None:
    if source is not None and any(part.startswith("pipe:") for part in source.split("::")):
        raise ValueError(f"{key}={source!r} would run a shell command; give an fsspec URL instead of pipe:")
