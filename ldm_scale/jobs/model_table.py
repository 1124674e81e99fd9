"""The networks of every experiment: parameters and operations of a forward pass, beside what was published of them.

    python -m ldm_scale.jobs.model_table OUT        `make model-table` writes docs/models.md

Every experiment is composed at full scale and built on the meta device, where shapes are all there is. Operations are
the multiplications and additions of matrix products and convolutions; 1 GFLOP is 1e9 of them.

Shape letters: B batch, C channels, H W height and width.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_scale.conditioning.class_label import ClassLabelConfig
from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.conditioning.layout import LayoutConfig
from ldm_scale.conditioning.spatial import ConcatConfig, LabelMapConfig
from ldm_scale.conditioning.text import TextTransformerConfig
from ldm_scale.core import storage
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs.schemas.experiment import Experiment

IMAGE_SIDE = 256  # pixels of the images that first stages are measured on


@dataclass(frozen=True, slots=True)
class FirstStageFigures:
    """A first stage on one image of IMAGE_SIDE; encoder and decoder with the 1x1 convolution beside them."""

    parameters: int
    encoder_gflop: float
    decoder_gflop: float

    def cells(self) -> list[str]:
        return [f"{self.parameters:,}", f"{self.encoder_gflop:.2f}", f"{self.decoder_gflop:.2f}"]


@dataclass(frozen=True, slots=True)
class DiffusionFigures:
    """A second stage on one latent of the size it trains on, and all the context tokens that its conditioner gives.

    unused  parameters that the published conditioner counts although nothing reads them: an output head over its
            vocabulary, which ours does not have
    """

    unet_parameters: int
    unet_gflop: float
    conditioner_parameters: int = 0
    unused: int = 0

    def cells(self) -> list[str]:
        unused = f" - {self.unused:,}" if self.unused else ""
        return [f"{self.unet_parameters:,}", f"{self.unet_gflop:.2f}", f"{self.conditioner_parameters:,}{unused}"]


Figures = FirstStageFigures | DiffusionFigures


_LDM_4 = DiffusionFigures(274_056_163, 202.40)
PUBLISHED: Mapping[str, Figures] = {  # facts.md 2.1 and 2.2
    "autoencoder_kl_f4": FirstStageFigures(55_312_063, 345.35, 670.58),
    "autoencoder_kl_f8": FirstStageFigures(83_653_863, 272.72, 622.19),
    "autoencoder_kl_f16": FirstStageFigures(69_610_963, 137.87, 252.15),
    "autoencoder_kl_f32": FirstStageFigures(103_880_131, 135.51, 251.44),
    "autoencoder_vq_f4": FirstStageFigures(55_322_782, 345.24, 670.58),
    "autoencoder_vq_f4_noattn": FirstStageFigures(53_219_486, 302.29, 627.63),
    "autoencoder_vq_f8": FirstStageFigures(67_717_295, 226.11, 472.40),
    "autoencoder_vq_f8_n256": FirstStageFigures(67_652_783, 226.11, 472.40),
    "autoencoder_vq_f16": FirstStageFigures(69_593_371, 137.81, 252.13),
    "uncond_celebahq": _LDM_4,
    "uncond_ffhq": _LDM_4,
    "uncond_lsun_bedrooms": _LDM_4,
    "uncond_lsun_churches": DiffusionFigures(294_966_916, 41.85),
    "class_imagenet": DiffusionFigures(400_920_579, 208.45, 512_512),
    "compression_f4": DiffusionFigures(400_920_579, 208.45, 512_000),
    "compression_f8": DiffusionFigures(394_984_196, 114.07, 512_000),
    "class_imagenet_ldm8": DiffusionFigures(394_984_196, 114.07, 512_000),
    "txt2img_laion": DiffusionFigures(872_300_484, 182.07, 581_994_042, unused=39_098_682),
    "stable_diffusion_v1": DiffusionFigures(859_520_964, 803.27, 123_060_480),
    "layout2img_openimages": DiffusionFigures(246_277_379, 151.24, 58_858_496, unused=4_202_496),
    "semantic_landscapes": DiffusionFigures(215_229_315, 207.63, 546),
    "semantic_landscapes_512": DiffusionFigures(215_229_315, 833.71, 546),
    "superres_bsr": DiffusionFigures(113_622_563, 80.46),
    "inpainting_places_big": DiffusionFigures(387_245_827, 300.86),
}
PAPER = {  # millions of parameters in the paper's tables 12 to 15 and its section 4.5, and what they count
    "uncond_celebahq": (274, "U-Net"),
    "uncond_ffhq": (274, "U-Net"),
    "uncond_lsun_bedrooms": (274, "U-Net"),
    "uncond_lsun_churches": (294, "U-Net"),
    "class_imagenet": (400, "U-Net"),
    "class_imagenet_ldm8": (395, "U-Net"),
    "txt2img_laion": (1450, "U-Net, conditioner"),
    "compression_f1": (396, "U-Net"),
    "compression_f2": (391, "U-Net"),
    "compression_f4": (400, "U-Net"),
    "compression_f8": (395, "U-Net"),
    "compression_f16": (395, "U-Net"),
    "compression_f32": (395, "U-Net"),
    "layout2img_openimages": (306, "U-Net, conditioner"),
    "layout2img_coco": (345, "U-Net, conditioner"),
    "semantic_landscapes": (215, "U-Net"),
    "semantic_landscapes_512": (215, "U-Net"),
    "superres_imagenet": (169, "U-Net, first stage"),
    "inpainting_places": (215, "U-Net"),
    "inpainting_places_noattn": (215, "U-Net"),
    "inpainting_places_big": (387, "U-Net"),
}

VARIANTS: Mapping[str, str] = {"txt2img_laion_2k": "txt2img_laion", "txt2img_laion_8k": "txt2img_laion"}
"""Experiments that train another one's networks, and which: the table has them once."""

_HEAD = """# Models

Every experiment at full scale, generated by `make model-table`; a test compares this file with what it writes.
Parameters are counted, and GFLOP (1e9 multiplications or additions of matrix products and convolutions) measured by
torch's FlopCounterMode in a forward pass of one sample. Published figures are those of the networks that were released,
measured by building them; `-` where none was.
"""
_FIRST_STAGES = f"""
## First stages

On images of {IMAGE_SIDE} x {IMAGE_SIDE}.
"""
_DIFFUSION = """
## Diffusion models

On latents of the size that each trains on. A published conditioner shown as a difference has an output head that
nothing reads; ours leaves it out. The last column counts what its brackets say, that head included. layout2img_coco has
the widths, depth and context of the paper's table 15, which no choice of levels with attention brings to the count that
the same table gives.
"""
_FIRST_STAGE_COLUMNS = (
    "experiment", "latent", "parameters", "published", "encoder GFLOP", "published", "decoder GFLOP", "published",
)  # fmt: skip
_DIFFUSION_COLUMNS = (
    "experiment", "first stage, latent", "U-Net", "published", "U-Net GFLOP", "published", "conditioner", "published",
    "paper",
)  # fmt: skip


def main() -> None:
    """Write the tables to the file named on the command line."""
    jobs = experiments()
    with storage.atomic_write(sys.argv[1]) as file:
        file.write(render(jobs, measure(jobs)).encode())


def experiments() -> dict[str, Experiment]:
    """Every experiment at full scale by name, but for variants; a job that refuses none of them."""
    names = {file.stem for file in (jobs_config.CONF / "experiment").glob("*.yaml")} - VARIANTS.keys()
    ordered = sorted(names, key=_natural)
    return {name: jobs_config.compose("precompute_latents", [f"+experiment={name}"]) for name in ordered}


def measure(jobs: Mapping[str, Experiment]) -> dict[str, Figures]:
    """What the networks of these experiments are made of: first stages where those are trained, else second stages."""
    return {
        name: measure_first_stage(job) if job.trains_first_stage else measure_diffusion(job)
        for name, job in jobs.items()
    }


def render(jobs: Mapping[str, Experiment], measured: Mapping[str, Figures]) -> str:
    """docs/models.md."""
    first_stages, diffusion = [], []
    for name, ours in measured.items():
        if jobs[name].trains_first_stage:
            first_stages.append(_first_stage_row(jobs[name], ours))
        else:
            diffusion.append(_diffusion_row(jobs[name], ours))
    tables = _table(_FIRST_STAGE_COLUMNS, first_stages), _table(_DIFFUSION_COLUMNS, diffusion)
    return f"{_HEAD}{_FIRST_STAGES}{tables[0]}{_DIFFUSION}{tables[1]}"


def measure_first_stage(job: Experiment) -> FirstStageFigures:
    """What the first stage of this experiment is made of."""
    with torch.device("meta"):
        network = job.first_stage.build()
        image_BCHW = torch.empty(1, 3, IMAGE_SIDE, IMAGE_SIDE)
        latent_BCHW = torch.empty(1, *job.first_stage.latent_shape(IMAGE_SIDE))
        return FirstStageFigures(
            parameters(network), _gflop(lambda: network.encode(image_BCHW)), _gflop(lambda: network.decode(latent_BCHW))
        )


def measure_diffusion(job: Experiment) -> DiffusionFigures:
    """What the second stage of this experiment is made of."""
    with torch.device("meta"):
        model = job.latent_diffusion.build_trained()
        conditioner = None if job.conditioning is None else job.conditioning.build()
        z_BCHW = torch.empty(1, *job.first_stage.latent_shape(job.data.transform.size))
        t_B, told = torch.zeros(1, dtype=torch.int64), model.conditions(conditioner_inputs(job))
        gflop = _gflop(lambda: model.network(z_BCHW, t_B, **told))
    return DiffusionFigures(parameters(model.unet), gflop, parameters(conditioner))


def conditioner_inputs(job: Experiment) -> Tensor | None:
    """What a training gives its conditioner of one sample, all zero, on torch's default device; None for none."""
    _, height, width = job.first_stage.latent_shape(job.data.transform.size)
    told = job.conditioning
    match told:
        case None:
            return None
        case ClipTextConfig():
            return torch.zeros(1, told.max_length, told.width, dtype=torch.float16)
        case TextTransformerConfig():
            return torch.zeros(1, told.max_length, dtype=torch.int64)
        case LayoutConfig():
            return torch.zeros(1, 3 * told.max_objects + 2 * told.crop, dtype=torch.int64)
        case ClassLabelConfig():
            return torch.zeros(1, dtype=torch.int64)
        case LabelMapConfig():
            return torch.zeros(1, height << told.halvings, width << told.halvings, dtype=torch.int64)
        case ConcatConfig():
            return torch.zeros(1, told.channels, height, width)
    raise AssertionError(f"no experiment has a {type(told).__name__}")


def parameters(network: nn.Module | None) -> int:
    """Numbers in its parameters, shared ones once."""
    return 0 if network is None else sum(parameter.numel() for parameter in network.parameters())


def _gflop(forward: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return float(counter.get_total_flops() / 1e9)


def _first_stage_row(job: Experiment, ours: Figures) -> list[str]:
    return [job.experiment, _latent(job, IMAGE_SIDE), *_beside(ours, PUBLISHED.get(job.experiment))]


def _diffusion_row(job: Experiment, ours: Figures) -> list[str]:
    stands_on = "pixels" if job.first_stage.checkpoint is None else Path(job.first_stage.checkpoint).name
    millions, counted = PAPER.get(job.experiment, (0, ""))
    return [
        job.experiment,
        f"{stands_on}, {_latent(job, job.data.transform.size)}",
        *_beside(ours, PUBLISHED.get(job.experiment)),
        f"{millions}M ({counted})" if millions else "-",
    ]


def _beside(ours: Figures, theirs: Figures | None) -> list[str]:
    """Each of our cells followed by the published one."""
    cells = ours.cells()
    published = theirs.cells() if theirs is not None else ["-"] * len(cells)
    return [cell for pair in zip(cells, published, strict=True) for cell in pair]


def _latent(job: Experiment, side: int) -> str:
    channels, height, width = job.first_stage.latent_shape(side)
    return f"{height} x {width} x {channels}"


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts f8 before f16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _table(columns: Sequence[str], rows: Sequence[list[str]]) -> str:
    """A Markdown table; the first two columns are words, the rest figures."""
    rule = "|".join(["---"] * 2 + ["---:"] * (len(columns) - 2))
    return "\n".join(["", f"| {' | '.join(columns)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows), ""])


if __name__ == "__main__":
    main()
