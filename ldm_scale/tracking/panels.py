"""The dashboard's panels, in the order in which they are read: for report.html and for the W&B workspace alike.

docs/dashboard.md is the same list as a table. A name is shown in the first panel one of whose patterns it fits, and is
of that panel's unit: one chart, one unit.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ldm_scale.tracking.cost import Forecast

SECTIONS = {
    "A": "State, goodput, money",
    "B": "Optimisation",
    "C": "Validation",
    "D": "Pictures and scores",
    "E": "Speed",
    "F": "Data",
    "G": "Events and provenance",
}
OTHERS = "Other numbers"
"""The section of names that no panel knows."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Names that share one chart, or one row of pictures."""

    code: str
    """Its section and number."""
    title: str
    names: tuple[str, ...]
    """Patterns (fnmatch) of the names it shows."""
    act_when: str
    note: str = ""
    """Which trainings log these names, where not all do; without names, where it is shown instead."""
    unit: str = ""
    """Of its numbers; empty where they are plain."""
    best: Literal["min", "max"] | None = None
    """Whether lower or higher is better, where one value of a run is its best."""

    @property
    def heading(self) -> str:
        """Code, title and unit, for the top of a chart."""
        return f"{self.code} {self.title}".strip() + (f" ({self.unit})" if self.unit else "")


@dataclass(frozen=True, slots=True)
class Level:
    """A number to hold curves against: a dashed line in report.html. (W&B's line plots have no such thing.)"""

    names: tuple[str, ...]
    """Patterns (fnmatch) of the curves that it is meant for."""
    label: str
    value: float


_FID = ("eval/fid", "eval/fid_raw", "eval/fid_ema*")
PAPER = {
    "txt2img_laion*": (
        Level(_FID, "paper: 30k of MS-COCO, no guidance", 23.31),
        Level(_FID, "paper: 30k of MS-COCO, guidance 1.5", 12.63),
    ),
}
"""What Rombach et al. 2022 report (table 2), by pattern of the experiments that repeat it."""

PANELS = (
    Panel("A1", "State", (), "not running, or an alert", "report header, `make status`"),
    Panel("A2", "Goodput", ("perf/goodput",), "below 0.95", unit="share of time"),
    Panel("A2", "Time lost, by reason", ("perf/lost_*",), "one share grows", unit="share of time"),
    Panel("A3", "Since the first launch", ("perf/hours",), "over 10% more than planned", unit="hours"),
    Panel("A3", "GPU hours, money", (), "over 10% more than planned at completion", "report header, `make status`"),
    Panel("A4", "Age of the newest checkpoint", (), "older than 2 intervals", "report header, `make status`"),
    Panel("A4", "What a crash would cost", ("perf/unsaved_minutes",), "above 2 intervals of saving", unit="minutes"),
    Panel("A4", "Not yet saved", ("perf/unsaved_images",), "above 2 intervals of saving", unit="images"),
    Panel("A4", "Last save", ("perf/save_s",), "creeping, or near half the launcher's grace", unit="s"),
    Panel("A4", "Free disk of the run directory", ("perf/disk_free_gb",), "less than two checkpoints", unit="GB"),
    Panel("B5", "Loss", ("train/loss",), "off the band of a reference run"),
    Panel(
        "B5", "Terms of the loss", ("train/l1", "train/perceptual", "train/kl", "train/codebook", "train/logvar"),
        "one term runs away", "first stages",
    ),
    Panel(
        "B5", "Discriminator", ("train/discriminator", "train/adversarial*", "train/logits_*"),
        "it always wins, or always loses", "first stages with a discriminator",
    ),
    Panel(
        "B5", "Use of the codebook, training and held out", ("train/codebook_usage", "eval/codebook_usage*"), "falls",
        "VQ first stages", "share of codes",
    ),
    Panel(
        "B5", "Perplexity of the codebook, training and held out",
        ("train/codebook_perplexity", "eval/codebook_perplexity*"), "falls", "VQ first stages", "codes",
    ),
    Panel("B6", "Training loss by timestep", ("train/loss_t???",), "one bucket moves alone", "diffusion models"),
    Panel("B7", "Gradient norm, whole and by part", ("train/grad_norm", "train/*_grad_norm"), "spikes, or creeps up"),
    Panel(
        "B7", "Clipped gradients", ("train/clipped",), "always 1, or rising", "`engine.grad_clip` above 0",
        "share of steps",
    ),
    Panel(
        "B7", "Updates by part", ("train/update_*",), "text near 0: it is not training",
        unit="share of the weights' norm",
    ),
    Panel("B8", "Learning rate", ("train/lr",), "differs from the configuration"),
    Panel("B8", "Global batch", ("train/global_batch",), "differs from the configuration", unit="images"),
    Panel(
        "B8", "Realised caption dropout", ("train/caption_dropout",), "differs from the configuration",
        "models told something", "share of samples",
    ),
    Panel(
        "B9", "Distance of the averages, by half-life in images", ("train/ema_distance*",),
        "flat zero: the average is dead", unit="share of the weights' norm",
    ),
    Panel("B10", "Skipped, non-finite, spikes", (), "any", "events `trouble` and `rollback`, with keys"),
    Panel(
        "C11", "Validation loss, averaged and raw weights",
        ("val/loss", "val/loss_raw", "val/loss_ema", "val/loss_ema*[!t]???"), "it rises again",
        "diffusion models", best="min",
    ),
    Panel(
        "C11", "Gap: raw weights' validation loss less their training loss", ("val/gap",), "it grows",
        "diffusion models scored in training",
    ),
    Panel(
        "C12", "Validation loss by timestep", ("val/loss_t???",), "one bucket moves alone", "diffusion models",
        best="min",
    ),
    Panel(
        "C12", "Validation loss by timestep, other weights", ("val/loss_*_t???",), "one bucket moves alone",
        "diffusion models", best="min",
    ),
    Panel(
        "C13", "Caption gap", ("val/caption_gap",), "0 or less after 5M images: the text path is broken",
        "models told something",
    ),
    Panel("D14", "Distance to real images", ("eval/fid*", "eval/fd_*"), "not falling", best="min"),
    Panel(
        "D15", "Guidance: distance against CLIP score", (), "no guidance is good at both",
        "report: curve and table, after `evaluate.py guidances=[...]`",
    ),
    Panel(
        "D16", "Kernel distance to real images", ("eval/kid*", "eval/kd_*"), "not falling",
        "with `kernel` in evaluation.scores", best="min",
    ),
    Panel(
        "D16", "Caption accuracy", ("eval/*accuracy*",), "not rising", "the toy world", "share of images", best="max"
    ),
    Panel("D16", "CLIP score", ("eval/clip*",), "not rising", "with CLIP's weights", "100 x cosine", best="max"),
    Panel(
        "D16", "Quality and variety", ("eval/precision*", "eval/recall*"), "one rises, the other falls",
        "with Inception's weights", "share of images", best="max",
    ),
    Panel("D16", "Inception score", ("eval/inception*",), "not rising", "with Inception's weights", best="max"),
    Panel("D16", "Reconstruction, PSNR", ("eval/psnr*",), "not rising", "first stages", "dB", best="max"),
    Panel("D16", "Reconstruction, SSIM", ("eval/ssim*",), "not rising", "first stages", best="max"),
    Panel("D16", "Reconstruction, LPIPS", ("eval/lpips*",), "not falling", "with LPIPS's weights", best="min"),
    Panel(
        "D16", "Fine detail against the originals'", ("eval/detail*",), "far from 1", "first stages", "share"
    ),
    Panel("D17", "Samples, fixed captions and noise", ("samples/grid*",), "grey, or all alike", "diffusion models"),
    Panel(
        "D17", "Prompt families, averaged and raw weights", ("samples/prompts*",), "a family stays behind",
        "text-to-image, guidance 1, 3 and 7",
    ),
    Panel("D17", "How samples come about", ("samples/progressive*",), "no step adds anything", "diffusion models"),
    Panel("D17", "Originals and reconstructions", ("samples/reconstructions*",), "blurred", "first stages"),
    Panel("D18", "What the model ate", ("samples/eaten*",), "captions misaligned, borders, wrong range"),
    Panel("E19", "Throughput", ("perf/images_per_s*",), "below 90% of `make plan`", unit="images/s"),
    Panel("E19", "MFU", ("perf/mfu",), "below 90% of `make plan`", unit="share of the arithmetic peak"),
    Panel(
        "E20", "Where a step's time goes", ("perf/split_*",), "data, communication or other grow", unit="share of time"
    ),
    Panel("E21", "Time of a step", ("perf/step_ms", "perf/own_ms*"), "max over median above 1.2", unit="ms"),
    Panel("E21", "Slowest rank", ("perf/slowest_rank",), "always the same", "several processes", "rank"),
    Panel("E22", "Waiting for data, worst rank", ("perf/data_wait*",), "above 0.02", unit="share of time"),
    Panel("E22", "Read, slowest rank", ("perf/read_mb_per_s*",), "it falls where waiting grows", unit="MB/s"),
    Panel(
        "E22", "Read without fetching, worst rank", ("perf/cache_hits*",), "not near 1 in later epochs: no room",
        "remote shards", "share of bytes",
    ),
    Panel(
        "E22", "Retries, worst rank", ("perf/retries*",), "any that go on: ask the store's owner", "remote shards",
        "requests since the last line",
    ),
    Panel("E23", "Memory, worst rank", ("perf/memory_gb*", "perf/host_gb*"), "creeping", unit="GB"),
    Panel("E24", "Power of the GPU", ("perf/gpu_power_w*",), "one is low: it waits, or is throttled", "GPUs", "W"),
    Panel("E24", "Clock of the slowest GPU", ("perf/gpu_clock_mhz*",), "it falls: throttled", "GPUs", "MHz"),
    Panel("E24", "Temperature of the GPU", ("perf/gpu_temperature_c*",), "above 85, or creeping", "GPUs", "Celsius"),
    Panel("E24", "Memory errors", ("perf/gpu_ecc_errors*",), "any: replace the GPU", "GPUs with ECC", "uncorrected"),
    Panel("F25", "Progress in the data", ("data/epoch", "data/*/epoch"), "more than intended", unit="epochs"),
    Panel(
        "F26", "Sources, asked and read", ("data/*/asked", "data/*/read"), "they part", "several sources", "samples"
    ),
    Panel(
        "F27", "Bad and removed samples", ("data/bad", "data/*/bad", "data/removed", "data/*/removed"),
        "above 0.1% of images", unit="share of samples",
    ),
    Panel(
        "F27", "Not read, by reason, since the launch", ("data/unread_*",), "any but `removed`",
        "once there are some; events `unread` have keys", "samples",
    ),
    Panel(
        "F27", "Own captions", ("data/own_caption", "data/*/own_caption"), "unexpected", "caption files",
        "share of samples",
    ),
    Panel("F28", "Mean of scaled latents", ("data/latent_mean*",), "not what is expected", "diffusion models"),
    Panel("F28", "Spread of scaled latents", ("data/latent_std*",), "not what is expected", "diffusion models"),
    Panel("F28", "Length of captions", ("data/caption_tokens",), "near the most that fit", "BERT's tokens", "tokens"),
    Panel(
        "F28", "Captions cut and empty", ("data/caption_truncated", "data/caption_empty"), "many", "BERT's tokens",
        "share of captions",
    ),
    Panel(
        "G29", "Events", ("events/*",), "a failure, a rollback", "report: markers on charts, and a table",
        "1, or how many so far",
    ),
    Panel("G30", "Provenance", (), "not what was meant", "report: launches and configuration; repro.json"),
)  # fmt: skip


def layout(names: Collection[str]) -> list[tuple[Panel, list[str]]]:
    """The panels that `names` fill, in order, each with its names, sorted; then one panel for each unknown name."""
    left, filled = sorted(names), list[tuple[Panel, list[str]]]()
    for panel in PANELS:
        own = [name for name in left if any(fnmatchcase(name, pattern) for pattern in panel.names)]
        left = [name for name in left if name not in own]
        if own:
            filled.append((panel, own))
    return filled + [(Panel("", name, (name,), ""), [name]) for name in left]


@functools.cache
def panel_of(name: str) -> Panel:
    """The panel that shows a name."""
    return layout([name])[0][0]


def levels(experiment: str, forecast: Forecast | None) -> list[Level]:
    """What the curves of a run of `experiment` are held against."""
    found = [level for known, own in PAPER.items() if fnmatchcase(experiment, known) for level in own]
    if forecast is not None:
        plan = f"plan: {forecast.world} x {forecast.machine}"
        found.append(Level(("perf/images_per_s",), plan, forecast.images_per_s))
        found.append(Level(("perf/mfu",), plan, forecast.mfu))
    return found


def section(panel: Panel) -> str:
    """The title of the section that a panel is in."""
    return f"{panel.code[0]}. {SECTIONS[panel.code[0]]}" if panel.code else OTHERS
