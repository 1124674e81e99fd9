"""The configuration of `sample.py`."""

from dataclasses import dataclass, field
from enum import Enum

from ldm_scale.jobs.schemas.drawing import Drawing
from ldm_scale.latent_diffusion.tiles import Tiles


class GuideDistance(Enum):
    """How far a picture is from the one that guides it."""

    l2 = "l2"
    """Squared error of pixels."""
    lpips = "lpips"
    """Learnt perceptual distance; needs `paths.weights`."""


@dataclass(kw_only=True, slots=True)
class GuideConfig:
    """Guidance by a small picture (Rombach et al. 2022, appendix C): what is drawn looks like it when made as small."""

    images: str | None = None
    """A picture, or several (directory or glob): one for all, or one each. None: no guidance."""
    scale: float | None = None
    """How strongly; goes with `images`."""
    distance: GuideDistance = GuideDistance.l2
    """What guidance makes small."""

    def __post_init__(self) -> None:
        if (self.images is None) != (self.scale is None) or (
            self.images is None and self.distance is not GuideDistance.l2
        ):
            raise ValueError("guide.images=FILES and guide.scale=NUMBER go together, and guide.distance= needs both")
        if self.scale is not None and self.scale <= 0:
            raise ValueError(f"guide.scale={self.scale}; must be above 0")


@dataclass(kw_only=True, slots=True)
class TilesConfig:
    """Denoising and decoding in overlapping tiles, for sizes beyond memory."""

    size: int | None = None
    """Side of a tile in latent cells; None: all at once."""
    overlap: int | None = None
    """Cells that neighbours share; None: a quarter of the side."""

    def __post_init__(self) -> None:
        if self.size is None and self.overlap is not None:
            raise ValueError(f"tiles.overlap={self.overlap} without tiles.size, the side of a tile in latent cells")
        self.build()

    def build(self) -> Tiles | None:
        """The tiles; None for none."""
        if self.size is None:
            return None
        return Tiles(size=self.size, overlap=self.size // 4 if self.overlap is None else self.overlap)


@dataclass(kw_only=True, slots=True)
class SampleJob(Drawing):
    """`sample.py`. Files are named by a path, a directory, a glob or a list (`.txt`)."""

    run_dir: str | None = None
    """The run directory of a training."""
    model: str | None = None
    """Instead of `run_dir`: a model directory, as `ldm_scale.interop` writes them."""
    batch: int
    """Pictures made at once, per process."""

    prompts: list[str] = field(default_factory=list)
    """For a model of captions: the captions."""
    prompts_file: str | None = None
    """Instead of `prompts`: a text file with one caption a line."""
    classes: list[int] = field(default_factory=list)
    """For a model of classes: their numbers."""
    boxes: str | None = None
    """For a model of layouts: a JSON file, see docs/sampling.md."""
    label_maps: str | None = None
    """For a model of label maps: PNG files whose pixels are labels."""
    low_resolution: str | None = None
    """For a super-resolution model: small pictures."""
    count: int | None = None
    """For an unconditional model: how many pictures."""
    images_per_prompt: int = 1
    """Pictures of each caption, class, layout, map ..., each with its own noise."""

    images: str | None = None
    """Inpainting, by a model trained for it or by any other: pictures whose masked part is painted anew."""
    masks: str | None = None
    """The masks of `images`, of the same names or one for all: white is painted, black is kept."""
    start: str | None = None
    """Pictures to start from instead of noise, one for all or one each."""
    strength: float | None = None
    """Share of the steps that redraws `start`, above 0; 1 keeps next to nothing of it."""
    guide: GuideConfig = field(default_factory=GuideConfig)
    """Guidance by a small picture."""
    truth: str | None = None
    """Pictures of what should come, one for all or one each: only shown, beside what came."""
    class_names: str | None = None
    """The classes.json that `data_tools.make_shards` wrote: classes get their names in the grid, not numbers."""
    size: list[int] | None = None
    """[height, width] of the pictures, pixels; None: as in training."""
    tiles: TilesConfig = field(default_factory=TilesConfig)
    """Denoising and decoding in tiles."""
    out: str | None = None
    """Directory of the PNGs and the grid; None: one for each request, in `samples` of the run or model."""

    def __post_init__(self) -> None:
        Drawing.__post_init__(self)
        if (self.run_dir is None) == (self.model is None):
            raise ValueError("name the model: run_dir=RUN or model=DIRECTORY, one of the two")
        if self.model is not None and (self.checkpoint, self.weights) != ("latest", "ema"):
            raise ValueError("checkpoint= and weights= choose within run_dir=; a model= directory holds one set")
        if self.prompts and self.prompts_file:
            raise ValueError("give prompts=['a caption', ...] or prompts_file=FILE, one of the two")
        counts = {"batch": self.batch, "images_per_prompt": self.images_per_prompt, "count": self.count}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; at least 1")
        for one, other in (("images", "masks"), ("start", "strength")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"{one}= and {other}= go together: give both, or neither")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength={self.strength}; must lie above 0 and at most at 1")
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size={self.size}; give [height, width] in pixels")
