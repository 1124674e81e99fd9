"""How many bytes a training keeps on each GPU, before it has one: closed forms, and activations measured without data.

P trained parameters, W processes, H averages. Number types are those of `training/engine.py`; what is partitioned, and
what the frameworks hold beside it, was read in deepspeed 0.19.8 and torch 2.15:

- DDP copies gradients into buckets of its own, all of them at once.
- Autocast keeps a bfloat16 copy of every float32 weight from the forward to the backward pass.
- ZeRO 1 in bfloat16 holds all gradients in float32 on every rank, and flattens up to 5e8 of them to reduce them, when
  the activations are gone.
- ZeRO 2 collects gradients in a bucket, and flattens a copy of it to reduce them; ZeRO 2 and 3 flatten a copy of their
  share of the gradients to step.
- ZeRO 3 keeps up to 1e9 gathered weights alive.

`benchmarks/memory.py` measures processes beside this.

Shape letters: B batch, C channels, H W height and width.
"""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm_scale.jobs.first_stage_cost import IMAGE_CHANNELS, Judges
from ldm_scale.jobs.model_table import conditioner_inputs
from ldm_scale.jobs.schemas.experiment import Experiment
from ldm_scale.nn.unet import BLOCK_KINDS
from ldm_scale.training.engine import DTYPES, EngineKind, Precision

_FLATTENED, _BUCKET, _LIVE = 500_000_000, 50_000_000, 1_000_000_000  # elements, see above
_BLOCK = re.compile(r".*\.(resnets|attentions|downsamplers|upsamplers)\.\d+")  # what a U-Net can recompute
Job = TypeVar("Job", bound=Experiment)


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    """Float32 masters, where they are not the weights, and two moments."""
    averages: int
    buffers: int
    """Of the frameworks: copies, buckets, gathered weights."""
    beside: int
    """Networks that do not train, and a discriminator with its gradients and moments."""
    activations: int
    transient: int
    """Needed when the activations are gone."""

    @property
    def total(self) -> int:
        """At the worst moment."""
        held = self.weights + self.gradients + self.optimizer + self.averages + self.buffers + self.beside
        return held + max(self.activations, self.transient)


def footprint(
    kind: EngineKind,
    precision: Precision,
    *,
    parameters: int,
    world: int,
    averages: int,
    beside: int = 0,
    activations: int = 0,
) -> Footprint:
    """What one of `world` processes holds.

    parameters   trained ones, P
    averages     how many, H
    beside       bytes of other networks, and of what one that learns needs
    activations  bytes kept from a forward pass of one micro batch for its backward pass
    """
    dtypes, stage = DTYPES[kind, precision], kind.zero_stage
    share = -(-parameters // world) if stage else parameters
    own_masters = stage in (1, 2) or (stage == 3 and dtypes.parameter is not dtypes.master)
    weight, master = dtypes.parameter.itemsize, dtypes.master.itemsize
    return Footprint(
        weights=weight * (share if stage == 3 else parameters),
        gradients=dtypes.accumulation.itemsize * (share if stage >= 2 else parameters),
        optimizer=master * share * (3 if own_masters else 2),
        averages=dtypes.ema.itemsize * share * averages,
        buffers=_buffers(kind, precision, parameters),
        beside=beside,
        activations=activations,
        transient=_transient(kind, precision, parameters, share),
    )


def _buffers(kind: EngineKind, precision: Precision, parameters: int) -> int:
    dtypes = DTYPES[kind, precision]
    bucket = dtypes.reduction.itemsize * min(parameters, _BUCKET)
    cast = 0 if dtypes.parameter is dtypes.compute else dtypes.compute.itemsize * parameters
    match kind:
        case EngineKind.one_process:
            return cast
        case EngineKind.ddp:
            return cast + dtypes.reduction.itemsize * parameters
        case EngineKind.zero1:
            return 0 if precision is Precision.bf16 else bucket
        case EngineKind.zero2:
            return bucket
        case EngineKind.zero3:
            return 2 * bucket + dtypes.parameter.itemsize * min(parameters, _LIVE)


def _transient(kind: EngineKind, precision: Precision, parameters: int, share: int) -> int:
    size = DTYPES[kind, precision].reduction.itemsize
    match kind:
        case EngineKind.zero1:
            return size * min(parameters, _FLATTENED) if precision is Precision.bf16 else 0
        case EngineKind.zero2:
            return size * max(share, min(parameters, _BUCKET))
        case EngineKind.zero3:
            return size * share
        case _:
            return 0


def checkpointing_everything(job: Job) -> Job:
    """The same experiment with every block of its U-Net recomputed."""
    assert job.unet is not None, "a first stage has no activation checkpointing"
    return replace(job, unet=replace(job.unet, activation_checkpointing=list(BLOCK_KINDS)))


def activation_bytes(job: Experiment, precision: Precision, batch: int) -> int:
    """Bytes that a forward pass of `batch` images keeps for the backward pass, or needs at its own peak if more.

    With activation checkpointing, also what the backward pass rebuilds of the largest block. Nothing is computed:
    shapes run through the networks as if on a GPU, under the engine's autocast, with attention that keeps its inputs,
    its output and one number a row. What judges a first stage keeps its own, in float32.
    """
    measured = _measure(job, precision, batch)
    if job.unet is None or not job.unet.activation_checkpointing:
        return max(measured.bytes, measured.peak)
    whole = replace(job, unet=replace(job.unet, activation_checkpointing=[]))
    return max(measured.bytes + _measure(whole, precision, batch).largest_block, measured.peak)


def _measure(job: Experiment, precision: Precision, batch: int) -> "_Live":
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    with torch.device("meta"):
        module: nn.Module = job.first_stage.build() if job.trains_first_stage else job.latent_diffusion.build_trained()
        given = None if job.trains_first_stage else conditioner_inputs(job)
    judges = Judges(job.autoencoder_loss) if job.trains_first_stage else None
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=dtype))
        if judges is None:
            live, forward = _Live(module), _second_stage(job, module, batch, given, dtype)
        else:
            for part in judges.networks.modules():  # one by one: LPIPS has the same ones under two names
                part._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), recurse=False)
            live = _Live(nn.ModuleList((module, judges.networks)))
            forward = _first_stage(job, module, judges, batch, dtype)
        with live, _Fused():
            kept = forward()
        live.freeze()
        del kept
    return live


def _first_stage(job: Experiment, module: Any, judges: Judges, batch: int, dtype: torch.dtype) -> Callable[[], object]:
    """A training's forward passes on a batch of nothing."""
    side = job.data.transform.size
    images_BCHW = torch.empty(batch, IMAGE_CHANNELS, side, side)
    noise_BCHW = torch.empty(batch, *job.first_stage.latent_shape(side))

    def forward() -> object:
        with _autocast(dtype):
            rebuilt = module(images_BCHW, noise_BCHW)
        return rebuilt, judges.keep(images_BCHW, rebuilt)

    return forward


def _second_stage(
    job: Experiment, module: Any, batch: int, inputs: Tensor | None, dtype: torch.dtype
) -> Callable[[], object]:
    """A training's forward pass on a batch of nothing; `inputs` is like one sample's condition."""
    z_BCHW = torch.empty(batch, *job.first_stage.latent_shape(job.data.transform.size))
    t_B = torch.zeros(batch, dtype=torch.int64)
    told = None if inputs is None else torch.zeros(batch, *inputs.shape[1:], dtype=inputs.dtype)

    def forward() -> object:
        with _autocast(dtype):
            return module.network(z_BCHW, t_B, **module.conditions(told)).float().square().mean()

    return forward


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are alive among those made while it lasts; a module's own do not count."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self.largest_block = 0
        """Of the bytes that one block of a U-Net keeps."""
        own = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers())]
        self._seen: dict[int, object] = {storage._cdata: storage for storage in own}
        self._frozen = False
        for name, block in module.named_modules():
            if _BLOCK.fullmatch(name):
                self._watch(block)

    def freeze(self) -> None:
        """Count no more, not even what is let go of."""
        self._frozen = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return out

    def _watch(self, block: nn.Module) -> None:
        before: list[int] = []

        def enter(*_: object) -> None:
            before.append(self.bytes)

        def leave(*_: object) -> None:
            self.largest_block = max(self.largest_block, self.bytes - before.pop())

        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

        def gone(_: object) -> None:
            self._seen.pop(key, None)
            self.bytes -= 0 if self._frozen else size

        self._seen[key] = weakref.ref(storage, gone)


class _Fused(TorchFunctionMode):
    """Attention as GPUs do it; where there is none, torch would choose the one that keeps every weight."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BNLK: Tensor, k_BNMK: Tensor, v_BNMK: Tensor) -> Tensor:
        out_BNLK = torch.empty_like(q_BNLK)
        sums_BNL = torch.empty(q_BNLK.shape[:-1], dtype=torch.float32, device=q_BNLK.device)
        ctx.save_for_backward(q_BNLK, k_BNMK, v_BNMK, out_BNLK, sums_BNL)
        return out_BNLK


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """`torch.autocast("cuda")`, which switches itself off on machines without a GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not torch.float32)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
