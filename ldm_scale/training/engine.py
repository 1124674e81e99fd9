"""Engines: how one model trains on one process or on many. Accelerate starts them, DeepSpeed partitions them (ZeRO).

An engine owns the process group, the wrapped model, its optimizer, gradient accumulation, clipping and number types.
It knows no loss, no data and no file. Everything that Accelerate or DeepSpeed would read from a file or the environment
is set here in code, and what came out is compared with what was asked for.

What the frameworks hide, seen with accelerate 1.15, deepspeed 0.19.8 and torch 2.15:

- `Accelerator.backward` under DeepSpeed also clips, steps and zeroes. `ZeroEngine` calls the two DeepSpeed methods
  itself, so that a step is a step on every engine.
- DeepSpeed casts buffers with the weights: a latent scale of 0.18215 becomes 0.1826. Buffers are put back as they were.
- DeepSpeed makes its float32 masters from weights already rounded to bfloat16. They are put back as they were too.
- DeepSpeed switches off an autocast that surrounds its engine; ours is inside the module it wraps. bfloat16 weights,
  matrix products and convolutions; normalisation as autocast does it; no caller has to cast its inputs.
- ACCELERATE_USE_CPU makes Accelerate drop DeepSpeed without a word and use DDP instead.
- On CPU, Accelerate wraps DDP only when told cpu=True, and DeepSpeed only when not told so.
- A foreign default_config.yaml reaches us as ACCELERATE_* variables; those that would change the numbers are removed.
- A gradient norm that is not finite makes DeepSpeed skip the step. The other engines do the same here.
- DeepSpeed talks over a clone of the world's group, with torch's own timeout: NCCL ends the process after ten minutes.
"""

import logging
import math
import os
import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.commands.config.config_args import default_config_file
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ldm_scale.core import runtime
from ldm_scale.core.shares import from_main
from ldm_scale.nn.compilation import compile_blocks
from ldm_scale.training.batch_fit import BatchFit as BatchFit
from ldm_scale.training.batch_fit import FittedBatch, fit_batch
from ldm_scale.training.learner import Learner
from ldm_scale.training.masters import Masters, Ratio, zero_masters
from ldm_scale.training.optimizer import OptimizerConfig

log = runtime.logger(__name__)

_REDUCE_BUCKET = 50_000_000  # elements; DeepSpeed's default of 5e8 reserves 2 GB of float32 on every GPU
_FOREIGN = (
    "ACCELERATE_USE_DEEPSPEED",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG",
    "ACCELERATE_GRADIENT_",
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_MIXED_PRECISION",
)
_HARMLESS = {"", "no", "false", "1", "default", "none"}


class EngineKind(Enum):
    """How weights, gradients and optimizer state are spread over processes."""

    one_process = "one_process"
    """A single process; no process group."""
    ddp = "ddp"
    """Every process holds everything; gradients are averaged."""
    zero1 = "zero1"
    """Optimizer state and float32 masters are partitioned (Rajbhandari et al. 2020)."""
    zero2 = "zero2"
    """And gradients; reduced at every micro batch."""
    zero3 = "zero3"
    """And weights; gathered layer by layer."""

    @property
    def zero_stage(self) -> int:
        """0 where DeepSpeed is not used."""
        return int(self.value.removeprefix("zero")) if self.value.startswith("zero") else 0


class Precision(Enum):
    """Number type of matrix products and convolutions; masters, moments and EMA are float32 always."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass(frozen=True, slots=True)
class Dtypes:
    """Which number type is used where; compared with the live tensors before training starts."""

    parameter: torch.dtype
    """Live weights."""
    compute: torch.dtype
    """Results of matrix products and convolutions."""
    norm: torch.dtype
    """Statistics inside group and layer norms."""
    reduction: torch.dtype
    """Gradients on the wire."""
    accumulation: torch.dtype
    """Gradients summed over micro batches."""
    master: torch.dtype
    """Weights that the optimizer changes, and its moments."""
    ema: torch.dtype
    """Averaged weights."""


_FP32, _BF16 = torch.float32, torch.bfloat16
_ALL_FP32 = Dtypes(_FP32, _FP32, _FP32, _FP32, _FP32, _FP32, _FP32)
_AUTOCAST = Dtypes(_FP32, _BF16, _FP32, _FP32, _FP32, _FP32, _FP32)
_ZERO_BF16 = Dtypes(_BF16, _BF16, _FP32, _FP32, _FP32, _FP32, _FP32)
DTYPES: dict[tuple[EngineKind, Precision], Dtypes] = {
    (EngineKind.one_process, Precision.fp32): _ALL_FP32,
    (EngineKind.ddp, Precision.fp32): _ALL_FP32,
    (EngineKind.zero1, Precision.fp32): _ALL_FP32,
    (EngineKind.zero2, Precision.fp32): _ALL_FP32,
    (EngineKind.zero3, Precision.fp32): _ALL_FP32,
    (EngineKind.one_process, Precision.bf16): _AUTOCAST,
    (EngineKind.ddp, Precision.bf16): _AUTOCAST,
    (EngineKind.zero1, Precision.bf16): _ZERO_BF16,
    (EngineKind.zero2, Precision.bf16): _ZERO_BF16,
    (EngineKind.zero3, Precision.bf16): _ZERO_BF16,
}


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """How training is spread over processes, and in which precision."""

    kind: EngineKind = EngineKind.zero1
    """Engine; any kind but one_process also runs in a world of one."""
    precision: Precision = Precision.bf16
    """Precision of the forward and backward pass."""
    grad_clip: float = 0.0
    """Largest gradient norm over all weights of the network that trains, and of what learns beside it; larger gradients
    are scaled down to it. 0 never clips."""
    compile: bool = False
    """Compile the networks' blocks: minutes more before the first step, faster from then on."""

    def __post_init__(self) -> None:
        if self.compile and self.kind is EngineKind.zero3:
            raise ValueError(
                "engine.compile=true with engine.kind=zero3: its weights are gathered inside the blocks, by hooks that "
                "cannot be compiled. Choose zero2, or compile=false"
            )
        if not 0 <= self.grad_clip < math.inf:
            raise ValueError(f"engine.grad_clip={self.grad_clip}; must be at least 0 and finite; 0 never clips")

    def build(self, *, global_batch: int, micro_batch: int, batch_fit: BatchFit = BatchFit.exact) -> "Engine":
        """Start the engine in this process; every process of the launch calls it once.

        global_batch  images per optimizer step, over all processes
        micro_batch   images per process and forward
        raises        ValueError where the batch does not divide, or where the launch cannot give this engine
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        _require_launch(self.kind, world)
        fitted = fit_batch(global_batch=global_batch, micro_batch=micro_batch, world=world, fit=batch_fit)
        if (fitted.global_batch, fitted.micro_batch) != (global_batch, micro_batch):
            taken = f"global_batch {fitted.global_batch}, micro_batch {fitted.micro_batch}"
            log.warning("batch_fit=nearest: %s instead of %d, %d", taken, global_batch, micro_batch)
        device = runtime.device()
        _forget_engines()
        _drop_foreign_settings()
        engine = ZeroEngine if self.kind.zero_stage else PlainEngine
        return engine(self, fitted, device)


class Engine(ABC):
    """One model being trained, the same to its user on every engine.

    engine = config.build(global_batch=96, micro_batch=12)
    engine.prepare(model, optimizer)
    for batch in micro_batches:
        with engine.accumulate():
            engine.backward(engine.model(batch).mean())
            grad_norm = engine.step(learning_rate)
        if engine.at_boundary:
            ...                                              # a global batch is done, the weights have moved
    """

    model: nn.Module
    """What is called for a forward pass in training; set by `prepare`."""
    module: nn.Module
    """The user's module inside it: its names, and (but under zero3) its whole weights; set by `prepare`."""
    masters: Masters
    """The float32 masters of this rank; set by `prepare`."""

    def __init__(self, config: EngineConfig, fitted: FittedBatch, device: torch.device) -> None:
        self.kind, self.precision = config.kind, config.precision
        self.dtypes = DTYPES[config.kind, config.precision]
        self.compute_dtype = self.dtypes.compute
        self.global_batch, self.micro_batch = fitted.global_batch, fitted.micro_batch
        self.accumulation = fitted.accumulation
        self.grad_clip, self._compile = config.grad_clip, config.compile
        self._accelerator = self._start(device)
        _wait_long(None)
        self.device = self._accelerator.device
        self.rank, self.world = runtime.rank(), runtime.world()
        self._grad_norm = torch.full((), math.nan, device=self.device)
        self.companions: dict[str, Companion] = {}
        """What learns beside the module, by name; see `accompany`."""
        self.companion_norms: dict[str, Tensor] = {}
        """Gradient norms of those that moved in the last step, before clipping; () on the device."""
        self.mark: Callable[[str], None] = lambda part: None
        """Told which part of a step has just ended, see training/telemetry.py."""
        if self.device.type != device.type:
            raise ValueError(f"Accelerate chose {self.device}, this machine has {device}: unset ACCELERATE_USE_CPU")

    def prepare(self, module: nn.Module, optimizer: OptimizerConfig) -> None:
        """Move `module` to the device, wrap it, and make its optimizer. Weights of rank 0 are everyone's.

        module  float32; every parameter of it is trained; frozen networks stay outside
        raises  ValueError naming parameters that are frozen or of another type, or where there is nothing to compile
        """
        frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
        if frozen:
            raise ValueError(
                f"{len(frozen)} parameters of the module to train are frozen: {', '.join(frozen[:10])}. Keep frozen "
                "networks outside it: they need no optimizer state, no partition and no checkpoint"
            )
        other = [f"{name} {p.dtype}" for name, p in module.named_parameters() if p.dtype is not torch.float32]
        if other:
            raise ValueError(f"the module to train must be float32; engine.precision casts it: {', '.join(other[:10])}")
        if self._compile and not compile_blocks(module):
            raise ValueError("engine.compile=true, but the module to train has none of the blocks of ldm_scale.nn")
        self.module = module
        self._wrap(_Autocast(module.to(self.device), self.device.type, self.compute_dtype), optimizer)
        found = self._measured_dtypes()
        assert found == self.dtypes, f"{self.kind.value} {self.precision.value}: asked {self.dtypes}, obtained {found}"

    def accompany(
        self, name: str, module: nn.Module, optimizer: OptimizerConfig, *, learning_rate_ratio: float = 1.0
    ) -> None:
        """Let `module` learn beside the one that `prepare` was given, by losses of its own: `companions[name]`.

        It moves in the same `step`: either all of what has gradients moves, or where some are not finite nothing. It is
        small (a discriminator), so that every rank holds all of it, and nothing of it is averaged or exported.

        module               float32; every parameter of it is trained
        learning_rate_ratio  its learning rate in those that `step` is given
        raises               ValueError where this engine or this device cannot
        """
        raise ValueError(
            f"engine.kind={self.kind.value} trains one network, and {name} would be another: choose engine.kind=ddp"
        )

    @property
    def companion_masters(self) -> dict[str, Masters]:
        """The float32 masters of what learns beside the module, by name."""
        return {name: companion.learner.masters for name, companion in self.companions.items()}

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """One micro batch: its forward, `backward` and `step` belong inside."""
        with self._accelerator.accumulate(*self._synchronised()):
            yield

    @property
    def at_boundary(self) -> bool:
        """True in and after the last micro batch of a global batch."""
        return bool(self._accelerator.sync_gradients)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, (), the mean over this rank's micro batch."""
        # The first callback that is queued is the first to run when all gradients are known: DDP queues its own later.
        loss.register_hook(lambda _: _after_backward(lambda: self.mark("forward_backward")))
        self._backward(loss)
        self.mark("communication")

    def step(self, learning_rate: float) -> Tensor:
        """At a boundary: clip, move the weights, clear the gradients. Otherwise nothing.

        A step whose gradient norm is not finite moves nothing, and the norm says so.

        returns  () float32 on the device: norm of the last global batch's mean gradient, before clipping
        """
        if self.at_boundary:
            self._grad_norm = self._step(learning_rate)
            self.mark("optimizer")
        return self._grad_norm

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values` over all ranks, on the device. Collective."""
        if self.world > 1:
            dist.all_reduce(values)
        return values / self.world

    def mean_over_ranks(self, values: Mapping[str, Tensor], ratios: Mapping[str, Ratio] = {}) -> dict[str, float]:
        """Means of device scalars over all ranks, and ratios: one collective and the only wait for the device.

        A ratio whose denominators are all 0 is left out.
        """
        scalars = [*values.values(), *(part for ratio in ratios.values() for part in ratio)]
        stacked = torch.stack([scalar.detach().float().to(self.device) for scalar in scalars])
        means = self.mean(stacked).tolist()
        parts = iter(means[len(values) :])
        found = {name: above / below for name, above, below in zip(ratios, parts, parts, strict=True) if below}
        return dict(zip(values, means, strict=False)) | found

    def close(self) -> None:
        """Let go of this engine; the process may start another of any kind. The process group stays."""
        _forget_engines()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)

    @abstractmethod
    def _start(self, device: torch.device) -> Accelerator: ...

    @abstractmethod
    def _wrap(self, module: "_Autocast", optimizer: OptimizerConfig) -> None: ...

    @abstractmethod
    def _synchronised(self) -> tuple[nn.Module, ...]:
        """What Accelerate must keep from reducing gradients between boundaries."""

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def _step(self, learning_rate: float) -> Tensor: ...

    @abstractmethod
    def _measured_dtypes(self) -> Dtypes: ...

    def _accelerate(self, **how: Any) -> Accelerator:
        plugin = GradientAccumulationPlugin(
            num_steps=self.accumulation, adjust_scheduler=False, sync_with_dataloader=False
        )
        return Accelerator(mixed_precision="no", gradient_accumulation_plugin=plugin, **how)


class PlainEngine(Engine):
    """One process, or DistributedDataParallel: float32 weights, autocast where the precision asks for it."""

    def _start(self, device: torch.device) -> Accelerator:
        if self.kind is EngineKind.ddp:
            _require_rendezvous()
        # Buffers are constants here; sent before every pass, they would keep all ranks waiting for the slowest.
        constant = DistributedDataParallelKwargs(broadcast_buffers=False)
        return self._accelerate(cpu=device.type == "cpu", kwargs_handlers=[constant])

    def _wrap(self, module: "_Autocast", optimizer: OptimizerConfig) -> None:
        self.model = self._accelerator.prepare_model(module, evaluation_mode=self.kind is EngineKind.one_process)
        _require_obtained(self.kind, isinstance(self.model, DistributedDataParallel) == (self.kind is EngineKind.ddp))
        self._own = Learner(self.module, optimizer)
        self.masters = self._own.masters

    def accompany(
        self, name: str, module: nn.Module, optimizer: OptimizerConfig, *, learning_rate_ratio: float = 1.0
    ) -> None:
        assert name not in self.companions, name
        module = self._with_synchronised_norms(name, module).to(self.device)
        from_main(module.parameters())
        learner = Learner(module, optimizer, prefix=f"{name}.", learning_rate_ratio=learning_rate_ratio)
        autocast = _Autocast(module, self.device.type, self.compute_dtype)
        self.companions[name] = Companion(autocast, learner, self.accumulation)

    def _with_synchronised_norms(self, name: str, module: nn.Module) -> nn.Module:
        """Batch norms that see the samples of all ranks, which torch has for GPUs only."""
        if self.world == 1 or not any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()):
            return module
        if self.device.type == "cpu":
            raise ValueError(
                f"the {name} has batch norms, which {self.world} processes can share on GPUs only (torch's "
                "SyncBatchNorm): choose norm=group, or one process"
            )
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)

    def _synchronised(self) -> tuple[nn.Module, ...]:
        return (self.model,)

    def _backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def _step(self, learning_rate: float) -> Tensor:
        beside = {name: one.learner for name, one in self.companions.items() if one.learner.has_gradients}
        for learner in beside.values():
            learner.average()  # as DDP did with the gradients of the module
        learners = [self._own, *beside.values()]
        norms = torch.stack([learner.grad_norm() for learner in learners])
        together = norms.sum()  # not finite where one of them is not: then nothing moves
        norms = torch.where(together.isfinite(), norms, together)
        for learner, norm in zip(learners, norms.unbind(), strict=True):
            learner.step(learning_rate, norm, self.grad_clip)
        self.companion_norms = dict(zip(beside, norms[1:].unbind(), strict=True))
        return norms[0]

    def _measured_dtypes(self) -> Dtypes:
        weights = _only({parameter.dtype for parameter in self.module.parameters()})
        compute, norm = _autocast_of(self.model).measured(weights, self.device)
        masters = _only({tensor.dtype for tensor in self.masters.tensors})
        return Dtypes(weights, compute, norm, weights, weights, masters, masters)


class ZeroEngine(Engine):
    """DeepSpeed ZeRO 1, 2 or 3: float32 masters in partitions; bfloat16 weights where the precision asks for them."""

    def _start(self, device: torch.device) -> Accelerator:
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise ValueError(
                f"ACCELERATE_USE_CPU is set, and Accelerate would drop DeepSpeed without a word: engine.kind="
                f"{self.kind.value} cannot be had. Launch with --multi_gpu instead of --cpu (it runs on CPU too), "
                "or use engine.kind=ddp"
            )
        _require_rendezvous()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        plugin = DeepSpeedPlugin(hf_ds_config=self._deepspeed_config(), zero3_init_flag=False)
        gloo = [InitProcessGroupKwargs(backend="gloo")] if device.type == "cpu" else []
        return self._accelerate(deepspeed_plugin=plugin, kwargs_handlers=gloo)

    def _deepspeed_config(self) -> dict[str, Any]:
        return {
            "train_batch_size": self.global_batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.grad_clip,
            "bf16": {"enabled": self.precision is Precision.bf16},
            "fp16": {"enabled": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_optimization": {"stage": self.kind.zero_stage, "reduce_bucket_size": _REDUCE_BUCKET},
            "zero_allow_untested_optimizer": True,
        }

    def _wrap(self, module: "_Autocast", optimizer: OptimizerConfig) -> None:
        if scalars := [name for name, parameter in self.module.named_parameters() if parameter.ndim == 0]:
            raise ValueError(f"DeepSpeed cannot hold parameters of shape (): give {', '.join(scalars)} the shape (1,)")
        module.to(memory_format=torch.contiguous_format)  # DeepSpeed broadcasts and flattens nothing else
        from_main((*module.parameters(), *module.buffers()))
        exact = self.precision is Precision.fp32
        weights = {} if exact else {name: p.detach().to("cpu", copy=True) for name, p in self.module.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        self._adam = optimizer.build(self.module)
        self.model, _ = self._accelerator.prepare(module, self._adam)
        self._require_deepspeed()
        _wait_long(self._deepspeed.data_parallel_group)
        self.masters = zero_masters(self.model, self.module, self._adam)
        _put_buffers(self.module, buffers)
        if weights:
            self.masters.assign(weights)

    def _require_deepspeed(self) -> None:
        from deepspeed import DeepSpeedEngine

        obtained = isinstance(self.model, DeepSpeedEngine)
        _require_obtained(self.kind, obtained and self._deepspeed.zero_optimization_stage() == self.kind.zero_stage)

    def _synchronised(self) -> tuple[nn.Module, ...]:
        return ()  # DeepSpeed is told about boundaries in `backward`

    def _backward(self, loss: Tensor) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(self.at_boundary)
        self._deepspeed.backward(loss)

    def _step(self, learning_rate: float) -> Tensor:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._deepspeed.step()
        return torch.as_tensor(self._deepspeed.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def _measured_dtypes(self) -> Dtypes:
        weights = _only({parameter.dtype for parameter in self.module.parameters()})
        compute, norm = _autocast_of(self.model).measured(weights, self.device)
        masters = _only({tensor.dtype for tensor in self.masters.tensors})
        reduction, (_, accumulation) = self._deepspeed.communication_data_type, self._deepspeed.get_data_types()
        return Dtypes(weights, compute, norm, reduction, accumulation, masters, masters)

    def close(self) -> None:
        self._deepspeed.destroy()
        super().close()

    @property
    def _deepspeed(self) -> Any:
        """DeepSpeed ships no types."""
        return self.model


class _Autocast(nn.Module):
    """The user's module with autocast inside, where no framework switches it off."""

    def __init__(self, module: nn.Module, device_type: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._device_type, self._dtype = device_type, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._context():
            return self.module(*args, **kwargs)

    def _context(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not torch.float32)

    @torch.no_grad()
    def measured(self, weights: torch.dtype, device: torch.device) -> tuple[torch.dtype, torch.dtype]:
        """Number types that products and norm statistics really have in here, for weights of a given type."""
        with self._context():
            product = nn.functional.linear(
                torch.ones(1, 8, device=device), torch.ones(8, 8, device=device, dtype=weights)
            )
            # Neighbours in bfloat16: only statistics in float32 can tell their mean from either of them.
            pair = torch.tensor([1.0, 1.0078125], device=device, dtype=product.dtype).repeat(1, 512)
            scale = torch.ones(1024, device=device, dtype=weights)
            normed = nn.functional.layer_norm(pair, (1024,), scale, torch.zeros_like(scale), eps=1e-12)
        exact = torch.allclose(normed.float().abs(), torch.ones(1, 1024, device=device), atol=0.01)
        return product.dtype, torch.float32 if exact else product.dtype


class Companion:
    """What learns beside the module of an engine. Call it for a forward pass, in the engine's precision."""

    def __init__(self, module: _Autocast, learner: Learner, accumulation: int) -> None:
        self.module, self.learner = module.module, learner
        self._autocast, self._accumulation = module, accumulation

    def __call__(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self._autocast(*inputs)
        return out

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, (), the mean over this rank's micro batch, to its own parameters only."""
        self.learner.backward(loss / self._accumulation)


def _after_backward(call: Callable[[], None]) -> None:
    """From a hook in a backward pass: call when every gradient is known."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def _autocast_of(model: nn.Module) -> _Autocast:
    inner = model if isinstance(model, _Autocast) else model.module
    assert isinstance(inner, _Autocast)
    return inner


def _put_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Set buffers by name, whatever type a framework cast them to."""
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, buffer)


def _only(values: set[torch.dtype]) -> torch.dtype:
    assert len(values) == 1, f"mixed number types: {values}"
    return values.pop()


def _require_launch(kind: EngineKind, world: int) -> None:
    if kind is EngineKind.one_process and world > 1:
        raise ValueError(
            f"engine.kind=one_process, but {world} processes were started. Launch one, `python train.py ...`, or "
            f"choose engine.kind=ddp or zero1: accelerate launch --multi_gpu --num_processes {world} --num_machines 1 "
            "--mixed_precision no train.py ..."
        )


def _require_obtained(kind: EngineKind, obtained: bool) -> None:
    if not obtained:
        raise ValueError(
            f"engine.kind={kind.value} was asked for, but Accelerate gave another. Launch with: accelerate launch "
            "--multi_gpu --num_processes N --num_machines 1 --mixed_precision no train.py ... (unset ACCELERATE_USE_*)"
        )


def _forget_engines() -> None:
    """Accelerate keeps its state in singletons; without this, a second engine would inherit the first one's."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _wait_long(group: dist.ProcessGroup | None) -> None:
    """Leave it to the watchdog to end what hangs in `group` (None: the world), and to say why.

    Set once the group is there, so that a process that never comes is missed by torch's own limit.
    """
    if dist.is_initialized():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its public name is younger than the oldest torch here
            dist.distributed_c10d._set_pg_timeout(runtime.PATIENCE, group)


def _require_rendezvous() -> None:
    """A world of one started without a launcher still needs a process group: say where it meets."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)


def _drop_foreign_settings() -> None:
    """Remove what a launcher's own config file would change about this run, and say so."""
    dropped = []
    for name in sorted(os.environ):
        if name.startswith(_FOREIGN):
            value = os.environ.pop(name)
            if value.lower() not in _HARMLESS:
                dropped.append(f"{name}={value}")
    if Path(default_config_file).is_file():
        log.warning("found %s: this run takes its engine from its own config, not from that file", default_config_file)
    if dropped:
        log.warning("ignoring settings of the Accelerate launcher or of its config file: %s", ", ".join(dropped))
