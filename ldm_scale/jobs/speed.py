"""How fast a training would be on how many GPUs: arithmetic, memory traffic and a network that all of them share.

Each step takes, one after the other unless said otherwise:

    arithmetic   images per GPU x operations per image / what matrix products sustain in training
    network      bytes of ring collectives / bus bandwidth; an all-reduce of n bytes moves 2 (W - 1) / W n through each
                 GPU, a reduce-scatter or an all-gather half of that; no latency, no congestion, no straggler
    update       bytes of weights, gradients, moments and averages that the optimizer and the averages touch / memory
                 bandwidth

What each engine sends, read in torch 2.15 and deepspeed 0.19.8; gradients travel in float32:

    ddp     gradients all-reduced once a step, beside the backward pass of the last micro batch
    zero1   gradients all-reduced once a step, after the backward pass; weights all-gathered
    zero2   gradients all-reduced at every micro batch, nothing beside it; weights all-gathered
    zero3   at every micro batch weights gathered twice and gradients reduce-scattered, beside the passes
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from ldm_scale.core import storage
from ldm_scale.training.engine import DTYPES, EngineKind, Precision

WORLDS = (8, 16, 32, 64, 128, 256, 504, 512)
_HIDDEN = 0.6  # share of the network's time that can run beside arithmetic, where the engine lets it
_RECOMPUTED = 4 / 3  # forward, forward again and backward against forward and backward
_UPDATE_BYTES, _AVERAGE_BYTES = 28, 12  # a parameter: weight, gradient and two moments read, three written; and a lerp


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """One GPU and its share of the network."""

    name: str
    peak: float
    """Dense bfloat16 operations per second, of which MFU is a share."""
    matmul: float
    """Operations per second that training's products sustain, without the network."""
    bus: float
    """Bytes per second through each GPU in a collective over all of them (NCCL's `busbw`)."""
    memory: int
    """Bytes."""
    memory_bandwidth: float
    """Bytes per second that a kernel without arithmetic reaches."""
    source: str = "assumed; launchers/burn_in measures them, --rates takes them"
    """Where the rates come from."""


MACHINES = {
    "h100": Machine(name="H100", peak=989e12, matmul=340e12, bus=250e9, memory=80_000_000_000, memory_bandwidth=2.5e12),
    "a100": Machine(name="A100", peak=312e12, matmul=150e12, bus=120e9, memory=80_000_000_000, memory_bandwidth=1.5e12),
}


def measured(file: Path, assumed: Machine) -> Machine:
    """A machine with the rates that a burn-in wrote to `file`; what that could not measure stays as assumed.

    raises  FileNotFoundError where it is not there, ValueError where it is no such file
    """
    found = storage.read_json(file)
    known = {part.name for part in fields(Machine)} - {"source"}
    if (
        not isinstance(found, dict)
        or not {"measured", "machine"} <= found.keys()
        or not found["machine"].keys() <= known
    ):
        raise ValueError(f"--rates {file} is not what launchers/burn_in writes: give its rates.json")
    rates = found["machine"]
    left = sorted(known - rates.keys())
    but = f"; {', '.join(left)} assumed, of {assumed.name}" if left else ""
    return replace(assumed, **rates, source=f"measured by launchers/burn_in, {found['measured']} ({file}){but}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One training, as far as its speed depends on it."""

    kind: EngineKind
    precision: Precision
    parameters: int
    averages: int
    flops_per_image: float
    """Forward and backward, without recomputation."""
    recomputed: bool
    """Whether blocks run again in the backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Seconds of one optimizer step, and what comes of them."""

    world: int
    global_batch: int
    micro_batch: int
    accumulation: int
    arithmetic: float
    network: float
    """All of it."""
    exposed: float
    """The part during which nothing else runs."""
    update: float

    @property
    def seconds(self) -> float:
        return self.arithmetic + self.exposed + self.update

    @property
    def images_per_s(self) -> float:
        """Of all GPUs together."""
        return self.global_batch / self.seconds

    def mfu(self, work: Work, machine: Machine) -> float:
        """Share of the GPUs' peak that reaches the model, recomputation not counted."""
        return self.images_per_s * work.flops_per_image / self.world / machine.peak


def step(work: Work, machine: Machine, *, world: int, micro_batch: int, accumulation: int) -> Step:
    """One optimizer step of `world` GPUs."""
    images = micro_batch * accumulation
    again = _RECOMPUTED if work.recomputed else 1.0
    arithmetic = images * work.flops_per_image * again / machine.matmul
    network = traffic(work, world=world, accumulation=accumulation) / machine.bus
    beside = {EngineKind.ddp: arithmetic / accumulation * 2 / 3, EngineKind.zero3: arithmetic}.get(work.kind, 0.0)
    share = 1 / world if work.kind.zero_stage else 1.0
    touched = work.parameters * share * (_UPDATE_BYTES + _AVERAGE_BYTES * work.averages)
    return Step(
        world=world,
        global_batch=images * world,
        micro_batch=micro_batch,
        accumulation=accumulation,
        arithmetic=arithmetic,
        network=network,
        exposed=network - min(_HIDDEN * network, beside),
        update=touched / machine.memory_bandwidth,
    )


def traffic(work: Work, *, world: int, accumulation: int) -> float:
    """Bytes that pass through each GPU in one optimizer step."""
    dtypes, ring = DTYPES[work.kind, work.precision], (world - 1) / world
    gradients = ring * dtypes.reduction.itemsize * work.parameters  # reduce-scattered; all-reduced is twice that
    weights = ring * dtypes.parameter.itemsize * work.parameters
    match work.kind:
        case EngineKind.one_process:
            return 0.0
        case EngineKind.ddp:
            return 2 * gradients
        case EngineKind.zero1:
            return 2 * gradients + weights
        case EngineKind.zero2:
            return 2 * gradients * accumulation + weights
        case EngineKind.zero3:
            return (gradients + 2 * weights) * accumulation


def knee(steps: list[Step]) -> int | None:
    """The most GPUs on which arithmetic is still at least half of the step; None where it is on none."""
    return max((one.world for one in steps if one.arithmetic >= one.seconds / 2), default=None)
