"""The float32 master weights that lie on this rank, on any engine: which piece of which parameter is where.

Optimizer moments, EMA and checkpoints all go through this one map, so none of them knows an engine.

    one_process, ddp   every rank holds every parameter; the parameters are the masters
    zero1, zero2       flat partitions of all parameters of a group, cut anywhere, one per rank; parameters are copies
    zero3              every parameter cut in equal parts, one per rank, in flat groups; in float32 the live
                       partition *is* the master

DeepSpeed has no public interface for this. What is read here, of deepspeed 0.19.8:

    DeepSpeedEngine               optimizer, zero_optimization_stage()
    BF16_Optimizer                fp32_groups_flat_partition, bf16_partitioned_groups, bf16_groups_flat,
      (zero1 with bf16)           real_dp_process_group, nccl_start_alignment_factor, allgather_bucket_size
    DeepSpeedZeroOptimizer        single_partition_of_fp32_groups, parallel_partitioned_bit16_groups, bit16_groups_flat,
      (zero1, zero2)              real_dp_process_group, nccl_start_alignment_factor, allgather_bucket_size
    DeepSpeedZeroOptimizer_Stage3 fp32_partitioned_groups_flat, fp16_partitioned_groups_flat, grad_position,
                                  get_param_id, persistent_parameters, _partition_all_parameters,
                                  _unflatten_partitioned_parameters
    parameters                    _hp_mapping (zero1, zero2); ds_shape, ds_numel, partition_numel() (zero3)
    deepspeed.runtime.utils       all_gather_dp_groups

A version that lacks one of them is refused with its name.
"""

import hashlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_TESTED_DEEPSPEED = "0.19.8"
_GATHERED_ELEMENTS = 2**26  # elements in flight on rank 0 while weights are consolidated: 256 MiB of float32
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}  # of a `chunked` piece of a list: what a cache holds, or 64 MiB
MOMENTS = ("exp_avg", "exp_avg_sq")
_MIX = tuple(factor - 2**64 for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64

Aligned = Sequence[Tensor] | Mapping[int, Tensor]
"""One tensor for each master, or for each that matters, by its place among them."""
Ratio = tuple[Tensor, Tensor]
"""Two device scalars, each of which is summed over all ranks before the first is divided by the second."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Flat elements [start, start + numel) of parameter `name` lie at [offset, offset + numel) of one flat master."""

    name: str
    """Parameter name in the unwrapped module."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    start: int
    numel: int
    master: int
    """Index into a list aligned with `Masters.tensors`."""
    offset: int


class Masters:
    """Float32 masters of this rank, the map of what they hold, and the optimizer state beside them.

    Any list of tensors aligned with `tensors` (moments, an EMA) is read and written through the same `pieces`.
    """

    def __init__(
        self,
        *,
        tensors: list[Tensor],
        pieces: list[Piece],
        shapes: dict[str, tuple[int, ...]],
        replicated: bool,
        adam: torch.optim.AdamW,
        push: Callable[[Sequence[Tensor]], None],
    ) -> None:
        self.tensors = tensors
        """Float32, on the training device; parameters, or flat under ZeRO, with padding that no piece covers."""
        self.pieces = pieces
        """What this rank holds."""
        self.shapes = shapes
        """Every trained parameter of the whole model, in the module's order."""
        self.replicated = replicated
        """True where every rank holds the same, whole parameters."""
        self.adam = adam
        """What steps `tensors`."""
        self._push = push

    def moments(self, key: str) -> list[Tensor]:
        """The Adam moment `key` ("exp_avg" or "exp_avg_sq") of every master; zeros before the first step."""
        return [self._state(master)[key] for master in self.tensors]

    @property
    def step(self) -> int:
        """Optimizer steps taken. Reading it waits for the device."""
        return int(self._state(self.tensors[0])["step"].item()) if self.tensors else 0

    @step.setter
    def step(self, value: int) -> None:
        for master in self.tensors:
            self._state(master)["step"].fill_(value)

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        state = self.adam.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            for key in MOMENTS:
                state[key] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()
        return state

    @torch.no_grad()
    def push(self, tensors: Sequence[Tensor] | None = None) -> None:
        """Put `tensors` (default: the masters themselves) into the live parameters. Collective under ZeRO.

        Where parameters and masters share memory (one_process, ddp, float32 zero3) this overwrites the masters.
        """
        self._push(self.tensors if tensors is None else tensors)

    @torch.no_grad()
    def read(self, tensors: Sequence[Tensor], piece: Piece) -> Tensor:
        """The elements of one piece, (numel,), in the parameter's logical order; a view where memory allows."""
        return tensors[piece.master].detach().reshape(-1)[piece.offset : piece.offset + piece.numel]

    @torch.no_grad()
    def write(self, tensors: Sequence[Tensor], piece: Piece, values: Tensor) -> None:
        """Set the elements of one piece from `values`, (numel,)."""
        target = tensors[piece.master].detach()
        if target.is_contiguous():
            target.view(-1)[piece.offset : piece.offset + piece.numel].copy_(values)
        else:  # channels_last: only whole parameters are laid out so, and copy_ keeps the logical order
            target.copy_(values.view(target.shape))

    @torch.no_grad()
    def assign(self, weights: Mapping[str, Tensor]) -> None:
        """Start from other weights: set masters and parameters from full tensors by name, moments and step to zero.

        raises  ValueError where `weights` lacks a parameter or has another shape for it
        """
        wrong = [n for n, shape in self.shapes.items() if n not in weights or tuple(weights[n].shape) != shape]
        if wrong:
            raise ValueError(f"weights lack, or shape differently, {len(wrong)} parameters: {', '.join(wrong[:10])}")
        for piece in self.pieces:
            flat = weights[piece.name].detach().reshape(-1)
            self.write(self.tensors, piece, flat[piece.start : piece.start + piece.numel])
        for key in MOMENTS:
            torch._foreach_zero_(self.moments(key))
        self.step = 0
        self.push()

    @torch.no_grad()
    def checksum(self, tensors: Sequence[Tensor]) -> str:
        """Tells values apart: the same for the same bits on any engine and any number of ranks. Collective."""
        own = sum(_checksum(piece, self.read(tensors, piece)) for piece in self.pieces)
        sums: list[Any] = [own]
        if not self.replicated and _is_distributed():
            sums = [None] * dist.get_world_size()
            dist.all_gather_object(sums, own)
        return f"{sum(sums) % 2**64:016x}"

    @torch.no_grad()
    def consolidated(self, tensors: Sequence[Tensor]) -> dict[str, Tensor] | None:
        """Whole tensors by parameter name, float32 on the CPU, on rank 0; None elsewhere. Collective.

        Nothing travels where masters are replicated. Otherwise rank 0 receives a few hundred MB at a time.
        """
        if self.replicated or not _is_distributed():
            return self._assembled([(self.pieces, tensors)]) if _rank() == 0 else None
        layouts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(layouts, self.pieces)
        held = [_gathered(tensor.detach()) for tensor in tensors]
        if _rank() != 0:
            return None
        return self._assembled([(pieces, [flats[r] for flats in held]) for r, pieces in enumerate(layouts)])

    def _assembled(self, parts: list[tuple[list[Piece], Sequence[Tensor]]]) -> dict[str, Tensor]:
        full = {name: torch.full((math.prod(shape),), math.nan) for name, shape in self.shapes.items()}
        for pieces, tensors in parts:
            for piece in pieces:
                full[piece.name][piece.start : piece.start + piece.numel] = self.read(tensors, piece)
        return {name: full[name].view(shape) for name, shape in self.shapes.items()}


def share(masters: Masters, rank: int, world: int) -> list[Piece]:
    """The pieces that `rank` answers for: its own, or where all ranks hold all, its stretch of them laid end to end."""
    if not masters.replicated:
        return masters.pieces
    total = sum(piece.numel for piece in masters.pieces)
    first, last = total * rank // world, total * (rank + 1) // world
    mine, begin = [], 0
    for p in masters.pieces:
        low, high = max(first - begin, 0), min(last - begin, p.numel)
        if low < high:
            mine.append(Piece(p.name, p.shape, p.start + low, high - low, p.master, p.offset + low))
        begin += p.numel
    return mine


def chunked(pieces: Sequence[Piece], device: torch.device) -> Iterator[list[Piece]]:
    """The same pieces, long ones cut, together as many as are copied at once for sums over them."""
    limit = _CHUNK_ELEMENTS[device.type]
    held, room = list[Piece](), limit
    for p in pieces:
        for begin in range(0, p.numel, limit):
            numel = min(limit, p.numel - begin)
            if numel > room:
                yield held
                held, room = [], limit
            held.append(Piece(p.name, p.shape, p.start + begin, numel, p.master, p.offset + begin))
            room -= numel
    if held:
        yield held


def laid_out(tensors: Aligned, pieces: Iterable[Piece]) -> list[Tensor]:
    """What pieces hold of tensors aligned with the masters, flat; views, where tensors are dense.

    Elements come in the order in which a whole master lies in memory, not in their logical one: for sums, over tensors
    of equal strides.
    """
    flats = []
    for piece in pieces:
        tensor = tensors[piece.master].detach()
        if not tensor.is_contiguous():
            tensor = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
        flat = tensor.reshape(-1)
        flats.append(flat if piece.numel == flat.numel() else flat[piece.offset : piece.offset + piece.numel])
    return flats


def square_sum(values: Tensor) -> Tensor:
    """The sum of squares, () on the device."""
    return torch.linalg.vector_norm(values).square()


def plain_masters(module: nn.Module, adam: torch.optim.AdamW, prefix: str = "") -> Masters:
    """Masters of a bare module or of one inside DistributedDataParallel: the parameters themselves.

    prefix  put before their names
    """
    named = [(prefix + name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    tensors: list[Tensor] = [parameter for _, parameter in named]

    def push(values: Sequence[Tensor]) -> None:
        if values is not tensors:
            torch._foreach_copy_([tensor.detach() for tensor in tensors], [value.detach() for value in values])

    return Masters(
        tensors=tensors,
        pieces=[Piece(name, tuple(p.shape), 0, p.numel(), i, 0) for i, (name, p) in enumerate(named)],
        shapes={name: tuple(p.shape) for name, p in named},
        replicated=True,
        adam=adam,
        push=push,
    )


def zero_masters(deepspeed_engine: Any, module: nn.Module, adam: torch.optim.AdamW) -> Masters:
    """Masters of a module trained by a DeepSpeedEngine at ZeRO stage 1, 2 or 3.

    module  the unwrapped module whose parameter names count
    adam    the client optimizer that DeepSpeed steps
    raises  RuntimeError naming the attribute that this DeepSpeed lacks
    """
    zero = _of(deepspeed_engine, "optimizer")
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if _of(deepspeed_engine, "zero_optimization_stage")() == 3:
        return _stage_3(zero, named, adam)
    return _stage_1_or_2(zero, named, adam)


def _stage_1_or_2(zero: Any, named: list[tuple[str, nn.Parameter]], adam: torch.optim.AdamW) -> Masters:
    if type(zero).__name__ == "BF16_Optimizer":
        names = ("fp32_groups_flat_partition", "bf16_partitioned_groups", "bf16_groups_flat")
    else:
        names = ("single_partition_of_fp32_groups", "parallel_partitioned_bit16_groups", "bit16_groups_flat")
    masters, partitions, flats = (_of(zero, name) for name in names)
    group, alignment = _of(zero, "real_dp_process_group"), _of(zero, "nccl_start_alignment_factor")
    bucket, rank = _of(zero, "allgather_bucket_size"), _rank()
    from deepspeed.runtime import utils

    all_gather = _of(utils, "all_gather_dp_groups")

    def push(values: Sequence[Tensor]) -> None:
        for parts, value in zip(partitions, values, strict=True):
            parts[rank].copy_(value)
        all_gather(
            groups_flat=flats,
            partitioned_param_groups=partitions,
            dp_process_group=group,
            start_alignment_factor=alignment,
            allgather_bucket_size=bucket,
        )

    return Masters(
        tensors=masters,
        pieces=[piece for name, parameter in named for piece in _mapped_piece(name, parameter)],
        shapes={name: tuple(parameter.shape) for name, parameter in named},
        replicated=False,
        adam=adam,
        push=push,
    )


def _mapped_piece(name: str, parameter: nn.Parameter) -> list[Piece]:
    """The piece of one parameter on this rank under ZeRO 1 or 2, none where another rank has it all."""
    mapping = _of(parameter, "_hp_mapping")
    if mapping is None:
        return []
    here, there = _of(mapping, "lp_fragment_address"), _of(mapping, "hp_fragment_address")
    shape, group = tuple(parameter.shape), _of(mapping, "param_group_index")
    return [Piece(name, shape, here.start, there.numel, group, there.start)]


def _stage_3(zero: Any, named: list[tuple[str, nn.Parameter]], adam: torch.optim.AdamW) -> Masters:
    masters, live = _of(zero, "fp32_partitioned_groups_flat"), _of(zero, "fp16_partitioned_groups_flat")
    persistent, release = _of(zero, "persistent_parameters"), _of(zero, "_partition_all_parameters")
    unflatten = _of(zero, "_unflatten_partitioned_parameters")
    positions, identify, rank = _of(zero, "grad_position"), _of(zero, "get_param_id"), _rank()
    pieces = []
    for name, parameter in named:
        group, offset, _ = positions[identify(parameter)]
        share = _of(parameter, "partition_numel")()
        start = share * rank
        numel = min(share, _of(parameter, "ds_numel") - start)
        if numel > 0:  # the last ranks may hold padding only
            pieces.append(Piece(name, tuple(_of(parameter, "ds_shape")), start, numel, group, offset))

    def push(values: Sequence[Tensor]) -> None:
        release()
        if persistent:
            persistent[0].partition(persistent)
        for index, value in enumerate(values):
            live[index].data.copy_(value)
            unflatten(index)
        if persistent:
            persistent[0].all_gather(persistent)

    return Masters(
        tensors=masters,
        pieces=pieces,
        shapes={name: tuple(_of(parameter, "ds_shape")) for name, parameter in named},
        replicated=False,
        adam=adam,
        push=push,
    )


def _checksum(piece: Piece, values_N: Tensor) -> int:
    """Of float32 values at their places, mixed as in splitmix64; summed modulo 2^64, cuts into pieces do not show."""
    name = int.from_bytes(hashlib.blake2b(piece.name.encode(), digest_size=8).digest(), "little", signed=True)
    place_N = torch.arange(piece.start, piece.start + piece.numel, device=values_N.device)
    mixed_N = (place_N * _MIX[0] + name) ^ values_N.contiguous().view(torch.int32).long()
    for factor, shift in zip(_MIX[1:], (30, 27), strict=True):
        mixed_N = (mixed_N ^ (mixed_N >> shift)) * factor
    return int((mixed_N ^ (mixed_N >> 31)).sum())


def _of(owner: Any, name: str) -> Any:
    """Read a DeepSpeed internal, or say which one this version lacks."""
    try:
        return operator.attrgetter(name)(owner)
    except AttributeError:
        import deepspeed

        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} has no {type(owner).__name__}.{name}, which ldm_scale reads to find "
            f"float32 master weights (written against {_TESTED_DEEPSPEED}). Install deepspeed=={_TESTED_DEEPSPEED}, or "
            "use engine.kind=ddp"
        ) from None


def _is_distributed() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gathered(flat: Tensor) -> list[Tensor]:
    """One equally sized flat tensor from every rank, on rank 0's CPU; empty elsewhere."""
    world, main = dist.get_world_size(), _rank() == 0
    whole = [torch.empty(flat.numel(), dtype=flat.dtype) for _ in range(world)] if main else []
    chunk = max(1, _GATHERED_ELEMENTS // world)
    for start in range(0, flat.numel(), chunk):
        mine = flat[start : start + chunk].contiguous()
        received = [torch.empty_like(mine) for _ in range(world)] if main else None
        dist.gather(mine, received, dst=0)
        for target, part in zip(whole, received or [], strict=True):
            target[start : start + chunk] = part
    return whole
