"""What a training will take, before a GPU hour is spent: memory, speed, money, disk, and what would stop it.

    python -m ldm_scale.jobs.plan +experiment=NAME [key=value ...] [--gpus N] [--machine h100|a100] [--json]

Takes the overrides of train.py. Speeds rest on the model in jobs/speed.py, whose rates are assumed ones, or those that
launchers/burn_in measured (`--rates`), or given by hand; memory on jobs/footprint.py; the checks are those of
jobs/preflight.py. Kept with the run (`--keep`), the dashboard holds the run against it.

exits  0 the job could start, once what is `to do` is done; 1 it would fail; 2 it is no job
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ldm_scale.conditioning.clip_text import ClipTextConfig
from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.data.config import Origin
from ldm_scale.data.tar import BLOCK
from ldm_scale.diffusion.timesteps import BUCKETS
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs import preflight, speed
from ldm_scale.jobs.first_stage_cost import Judges
from ldm_scale.jobs.footprint import Footprint, activation_bytes, checkpointing_everything, footprint
from ldm_scale.jobs.model_table import conditioner_inputs, parameters
from ldm_scale.jobs.precompute import member_bytes, moments_of, text_shape
from ldm_scale.jobs.preflight import Check
from ldm_scale.jobs.schemas.experiment import PROMPT_GUIDANCES, Experiment
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.speed import Machine, Step, Work
from ldm_scale.training.batch_fit import BatchFit, fit_batch
from ldm_scale.training.engine import EngineKind
from ldm_scale.training.throughput import forward_flops
from ldm_scale.training.validation import VALIDATED

_GPU_CONTEXT = 2_000_000_000  # bytes of CUDA, cuDNN and NCCL, outside of torch's allocator
_TEXT_BYTES = 256  # of a cached caption with its index and metadata, beside the blocks that it fills


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Networks of the experiment; operations are multiplications and additions."""

    parameters: int
    """Trained ones."""
    beside_bytes: int
    """On each GPU, of networks that do not train, and of a discriminator with its gradients and moments."""
    training_flops: float
    """To train on an image: forward and twice as much backward, and what judges a first stage."""
    encoder_flops: float
    """From an image to its latent; 0 where nothing is encoded."""
    evaluation_flops: float
    """Of one evaluation, by all processes together."""
    showing_flops: float
    """Of one sample grid, on every process."""
    prompting_flops: float
    """Of fixed captions by raw and averaged weights, by all processes together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """One engine at the asked number of GPUs."""

    kind: EngineKind
    checkpointing: bool
    footprint: Footprint
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """The training on some number of GPUs."""

    step: Step
    is_exact: bool
    """Whether the global batch is the one that was asked for."""
    mfu: float
    evaluation_share: float
    """Of the time: scores and sample grids, which every process makes whole."""
    gpu_hours: float
    price: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything that is printed."""

    experiment: str
    figures: Figures
    machine: Machine
    world: int
    memory: list[Memory]
    scales: list[Scale]
    knee: int | None
    checkpoint_bytes: int
    checkpoints: int
    cached_bytes_per_image: int
    """0 where there is no cache."""
    encoding_hours_per_million: float
    break_even_runs: float | None
    """Trainings after which a cache has cost less than encoding in every step; None without a count of images."""
    checks: list[Check]

    @property
    def would_fail(self) -> bool:
        return any(check.state == "fails" for check in self.checks)


def plan(job: TrainJob, machine: Machine, *, world: int, images: int | None = None, price: float | None = None) -> Plan:
    """Work everything out.

    images  in the data set; None counts those that are there
    price   of one GPU for an hour
    """
    figures = measure(job)
    images = _images_there(job) if images is None else images
    memory = memory_of(job, machine, figures, world)
    own = next(one for one in memory if one.kind is job.engine.kind and one.checkpointing == _recomputes(job))
    work = Work(
        kind=job.engine.kind,
        precision=job.engine.precision,
        parameters=figures.parameters,
        averages=len(job.ema_half_lives),
        flops_per_image=figures.training_flops,
        recomputed=_recomputes(job),
    )
    scales = [_scale(job, figures, work, machine, one, price) for one in sorted({*speed.WORLDS, world})]
    kept = job.keep_last + 1 + (job.total_images // job.keep_every if job.keep_every else 0)
    checkpoint_bytes = 4 * figures.parameters * (3 + len(job.ema_half_lives))
    needs = preflight.Needs(
        world=world,
        checkpoint_bytes=checkpoint_bytes,
        checkpoints=kept,
        gpu_bytes=own.footprint.total + _GPU_CONTEXT,
        gpu_memory=machine.memory,
    )
    return Plan(
        experiment=job.experiment,
        figures=figures,
        machine=machine,
        world=world,
        memory=memory,
        scales=scales,
        knee=speed.knee([scale.step for scale in scales]),
        checkpoint_bytes=checkpoint_bytes,
        checkpoints=kept,
        cached_bytes_per_image=_cached_bytes(job),
        encoding_hours_per_million=1e6 * figures.encoder_flops / machine.matmul / 3600,
        break_even_runs=None if images is None else images / job.total_images,
        checks=preflight.checks(job, needs),
    )


def measure(job: Experiment) -> Figures:
    """The networks of an experiment, on the meta device."""
    size, scores, grid = job.data.transform.size, job.evaluation.images, job.evaluation.grid
    with torch.device("meta"):
        first, image_BCHW = job.first_stage.build(), torch.empty(1, 3, size, size)
        z_BCHW = torch.empty(1, *job.first_stage.latent_shape(size))
        encode, decode = forward_flops(lambda: first.encode(image_BCHW)), forward_flops(lambda: first.decode(z_BCHW))
    if job.trains_first_stage:
        judges = Judges(job.autoencoder_loss)
        return Figures(
            parameters=parameters(first),
            beside_bytes=judges.bytes,
            training_flops=3 * (encode + decode) + judges.flops(size),
            encoder_flops=0.0,
            evaluation_flops=scores * len(job.evaluation.weights) * (encode + decode),
            showing_flops=grid / 2 * (encode + decode),
            prompting_flops=0.0,
        )
    with torch.device("meta"):
        model = job.latent_diffusion.build_trained()
        conditioner = None if job.conditioning is None else job.conditioning.build()
        t_B, inputs = torch.zeros(1, dtype=torch.int64), conditioner_inputs(job)
        told = model.conditions(inputs)
        forward, denoise = (
            forward_flops(lambda: model.network(z_BCHW, t_B, **model.conditions(inputs))),
            forward_flops(lambda: model.network(z_BCHW, t_B, **told)),
        )

    def drawn(guidance: float) -> float:
        return denoise * job.sampler.steps * (1 if guidance == 1 else 2) + decode

    draw, captions = drawn(job.sampler.guidance), sum(len(family) for family in job.prompts.values())
    scored, validated = job.evaluation.weights, {*job.evaluation.weights, "raw"}
    return Figures(
        parameters=parameters(model),
        beside_bytes=4 * (parameters(first) + parameters(conditioner) - parameters(model.conditioner)),
        training_flops=3 * forward,
        encoder_flops=encode,
        evaluation_flops=scores * len(scored) * draw + min(scores, VALIDATED) * len(validated) * BUCKETS * forward,
        showing_flops=grid * draw,
        prompting_flops=2 * captions * sum(drawn(guidance) for guidance in PROMPT_GUIDANCES),
    )


def memory_of(job: TrainJob, machine: Machine, figures: Figures, world: int) -> list[Memory]:
    """Every engine, as configured and (a U-Net) with every block recomputed."""
    variants: dict[bool, TrainJob] = {_recomputes(job): job}
    if job.unet is not None:
        plain = replace(job, unet=replace(job.unet, activation_checkpointing=[]))
        variants = {False: plain, True: checkpointing_everything(job), **variants}
    found = []
    for checkpointing, variant in variants.items():
        activations = activation_bytes(variant, job.engine.precision, job.micro_batch)
        for kind in EngineKind:
            if kind is EngineKind.one_process and kind is not job.engine.kind and world > 1:
                continue
            held = footprint(
                kind,
                job.engine.precision,
                parameters=figures.parameters,
                world=world,
                averages=len(job.ema_half_lives),
                beside=figures.beside_bytes,
                activations=activations,
            )
            fits = held.total + _GPU_CONTEXT <= machine.memory
            found.append(Memory(kind=kind, checkpointing=checkpointing, footprint=held, fits=fits))
    return found


def _scale(job: TrainJob, figures: Figures, work: Work, machine: Machine, world: int, price: float | None) -> Scale:
    fitted = fit_batch(global_batch=job.global_batch, micro_batch=job.micro_batch, world=world, fit=BatchFit.nearest)
    step = speed.step(work, machine, world=world, micro_batch=fitted.micro_batch, accumulation=fitted.accumulation)

    def share(flops: float, parts: int) -> float:  # of the busiest process, since whole parts are shared out
        return flops * math.ceil(parts / world) / max(parts, 1)

    evaluation = share(figures.evaluation_flops, math.ceil(job.evaluation.images / job.evaluation.batch))
    prompting = share(figures.prompting_flops, len(job.prompts))
    looks = [(evaluation, job.every.evaluate), (figures.showing_flops + prompting, job.every.sample)]
    looking = sum(flops / every for flops, every in looks if every) / machine.matmul  # seconds, per image trained on
    seconds = 1 / step.images_per_s + looking
    hours = job.total_images * seconds * world / 3600
    return Scale(
        step=step,
        is_exact=fitted.global_batch == job.global_batch,
        mfu=step.mfu(work, machine),
        evaluation_share=looking / seconds,
        gpu_hours=hours,
        price=None if price is None else price * hours,
    )


def _images_there(job: TrainJob) -> int | None:
    """In the latent cache, or else in the image shards; None where there is neither."""
    for open_all in (job.data.open_latents, job.data.open_images):
        with suppress(ValueError, OSError):
            return sum(store.n for store in open_all().values())
    return None


def _recomputes(job: Experiment) -> bool:
    return job.unet is not None and bool(job.unet.activation_checkpointing)


def _cached_bytes(job: Experiment) -> int:
    """Of one image in a latent cache: blocks of the latent and of the caption (and its tokens), index and metadata."""
    if job.trains_first_stage or job.data.source is Origin.images:
        return 0
    _, shape = moments_of(job.first_stage, job.data.transform.size)
    text = member_bytes(text_shape(job.conditioning)) if isinstance(job.conditioning, ClipTextConfig) else 0
    return member_bytes(shape) + text + 2 * BLOCK + _TEXT_BYTES


def show(found: Plan, console: Console) -> None:
    """The plan for people."""
    figures, machine = found.figures, found.machine
    console.print(
        f"[bold]{found.experiment}[/]: {figures.parameters:,} trained parameters, "
        f"{figures.training_flops / 1e9:,.1f} GFLOP an image (forward and backward)"
    )
    console.print(_memory_table(found))
    console.print(_scale_table(found))
    knee = f"{found.knee} GPUs" if found.knee else "none of these"
    console.print(
        f"  Model: products sustain {machine.matmul / 1e12:.3g} TFLOP/s of {machine.peak / 1e12:.3g}, collectives "
        f"{machine.bus / 1e9:.3g} GB/s, kernels without arithmetic {machine.memory_bandwidth / 1e12:.2g} TB/s.\n"
        f"  Rates: {machine.source}.\n"
        "  Not in them: data, compilation, stragglers, checkpoints.\n"
        f"  Knee: arithmetic is at least half of the step up to {knee}. Batches marked (nearest) ask for "
        "batch_fit=nearest.\n"
        f"  Checkpoint: {found.checkpoint_bytes / 1e9:,.1f} GB; at most {found.checkpoints} of them on disk.",
        highlight=False,
        soft_wrap=True,
    )
    if figures.encoder_flops:
        console.print(_cache_words(found), highlight=False, soft_wrap=True)
    console.print(_check_table(found))


def _memory_table(found: Plan) -> Table:
    title = f"Memory of each of {found.world} GPUs, GB; {found.machine.name} has {found.machine.memory / 1e9:.0f}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    parts = [field.name for field in dataclasses.fields(Footprint)]
    for column in ("engine", "recomputed", *parts, "at most", "fits"):
        table.add_column(column, justify="left" if column in ("engine", "fits") else "right")
    for one in found.memory:
        cells = [f"{part / 1e9:.1f}" for part in dataclasses.asdict(one.footprint).values()]
        again, fits = "all" if one.checkpointing else "none", "yes" if one.fits else "NO"
        table.add_row(one.kind.value, again, *cells, f"{one.footprint.total / 1e9:.1f}", fits)
    return table


def _scale_table(found: Plan) -> Table:
    table = Table(title="Speed and cost, modelled", title_justify="left", box=box.SIMPLE)
    columns = ("GPUs", "global batch", "micro x accumulated", "images/s", "MFU", "step ms", "arithmetic", "network")
    priced = any(scale.price is not None for scale in found.scales)
    for column in (*columns, "update", "evaluation", "GPU hours", "days", *(["price"] if priced else [])):
        table.add_column(column, justify="right")
    for scale in found.scales:
        step = scale.step
        shares = [f"{part / step.seconds:.0%}" for part in (step.arithmetic, step.exposed, step.update)]
        table.add_row(
            str(step.world),
            f"{step.global_batch:,}" + ("" if scale.is_exact else " (nearest)"),
            f"{step.micro_batch} x {step.accumulation}",
            f"{step.images_per_s:,.0f}",
            f"{scale.mfu:.0%}",
            f"{1e3 * step.seconds:,.1f}",
            *shares,
            f"{scale.evaluation_share:.1%}",
            f"{scale.gpu_hours:,.0f}",
            f"{scale.gpu_hours / step.world / 24:,.2f}",
            *([] if scale.price is None else [f"{scale.price:,.0f}"]),
        )
    return table


def _cache_words(found: Plan) -> str:
    hours = found.encoding_hours_per_million
    said = (
        f"  Latents: encoding takes {hours:.2f} GPU hours a million images (in bfloat16), and "
        f"{found.cached_bytes_per_image:,} bytes an image in a cache."
    )
    if found.break_even_runs is None:
        return f"{said} --images N says when a cache has paid."
    return f"{said} A cache costs less than encoding in every step from {found.break_even_runs:.2f} trainings on."


def _check_table(found: Plan) -> Table:
    table = Table(title="Before it starts", title_justify="left", box=box.SIMPLE)
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    styles = {"ok": "green", "to do": "yellow", "fails": "bold red"}
    for check in found.checks:
        table.add_row(check.name, Text(check.state, style=styles[check.state]), Text(check.said))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("overrides", nargs="+", help="as for train.py: +experiment=NAME key=value ...")
    parser.add_argument("--gpus", type=int, default=8, help="that the memory and the checks are for (default: 8)")
    parser.add_argument("--machine", choices=speed.MACHINES, default="h100", help="rates and memory (default: h100)")
    parser.add_argument("--rates", type=Path, help="rates.json of launchers/burn_in, in place of the assumed ones")
    parser.add_argument("--matmul-tflops", type=float, help="that products sustain in training, 1e12 a second")
    parser.add_argument("--bus-gbs", type=float, help="of a collective over all GPUs (NCCL's busbw), 1e9 bytes/s")
    parser.add_argument("--memory-gb", type=float, help="of a GPU, 1e9 bytes")
    parser.add_argument("--price", type=float, help="of one GPU for an hour, in any money")
    parser.add_argument("--images", type=int, help="in the data set, where it is not there yet")
    parser.add_argument("--keep", action="store_true", help="write it into the run directory too, for the dashboard")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    arguments = parser.parse_intermixed_args(argv)
    named = any(text.startswith("name=") for text in arguments.overrides)
    if arguments.keep and not named:
        parser.error("--keep writes into a run directory: say which run it is, name=NAME")
    overrides = [*([] if named or "scale=toy" in arguments.overrides else ["name=plan"]), *arguments.overrides]
    found: list[Plan] = []
    jobs_config.or_exit(lambda: found.append(_plan(arguments, overrides)))
    (one,) = found
    if arguments.json:
        print(json.dumps(_plain(one), indent=2))
    else:
        console = Console()
        show(one, console if console.is_terminal else Console(width=160))
    return 1 if one.would_fail else 0


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> Plan:
    job = jobs_config.compose("train", overrides)
    given = {
        "matmul": arguments.matmul_tflops and 1e12 * arguments.matmul_tflops,
        "bus": arguments.bus_gbs and 1e9 * arguments.bus_gbs,
        "memory": arguments.memory_gb and int(1e9 * arguments.memory_gb),
    }
    for name, value in {**given, "--gpus": arguments.gpus}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name}={value}; must be above 0")
    machine = speed.MACHINES[arguments.machine]
    if arguments.rates is not None:
        machine = speed.measured(arguments.rates, machine)
    by_hand: dict[str, Any] = {key: value for key, value in given.items() if value}
    if by_hand:
        machine = replace(machine, **by_hand, source=f"{', '.join(by_hand)} by hand; others {machine.source}")
    found = plan(job, machine, world=arguments.gpus, images=arguments.images, price=arguments.price)
    if arguments.keep:
        storage.write_json(RunDir(Path(job.run_dir)).plan, _plain(found))
    return found


def _plain(found: Plan) -> dict[str, Any]:
    """JSON values: every field, and what follows from them."""
    plain = jobs_config.to_plain(found)
    plain["would_fail"] = found.would_fail
    for one, memory in zip(plain["memory"], found.memory, strict=True):
        one["footprint"]["total"] = memory.footprint.total
    for one, scale in zip(plain["scales"], found.scales, strict=True):
        one["step"] |= {"seconds": scale.step.seconds, "images_per_s": scale.step.images_per_s}
    return dict(plain)


if __name__ == "__main__":
    sys.exit(main())
