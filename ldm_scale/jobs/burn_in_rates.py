"""What a host sustains: arithmetic, memory, collectives, reading samples, writing files. Every rank at the same time.

`measure` is what a worker of a burn-in does. It notes each rate as it comes, so that what hangs is known by name.

Letters: W processes that a collective joins.
"""

import csv
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ldm_scale.core import runtime
from ldm_scale.data.config import Origin
from ldm_scale.data.loader import Loader
from ldm_scale.jobs import config as jobs_config
from ldm_scale.jobs.schemas.train import TrainJob
from ldm_scale.jobs.stages import open_images
from ldm_scale.training.throughput import peak_flops

_HANG_S = 120
_SIDE = {"cuda": 8192, "cpu": 512}  # of the matrices that are multiplied
_COPIED = {"cuda": 1 << 28, "cpu": 1 << 24}  # float32 numbers that a kernel without arithmetic reads twice, writes once
_SENT = {"cuda": 1 << 26, "cpu": 1 << 20}  # float32 numbers of a collective
_CHUNK, _MOST_WRITTEN = 1 << 22, 1 << 30  # bytes
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown")
"""Causes of slow clocks, in nvidia-smi's words, that a sound GPU does not have."""
_GPU = ("index", "name", "ecc.errors.uncorrected.volatile.total", "clocks.sm", "clocks.max.sm", "temperature.gpu")
_SMI_S = 30.0

Rate = Callable[[], float]


class Notes:
    """What one rank measured, a JSON object a line; what it is at is written before it begins."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = folder / f"{rank}.jsonl"

    def rate(self, name: str, rate: Rate) -> None:
        """Measure, all ranks at the same time."""
        dist.barrier()
        self.write(at=name)
        self.write(**{name: rate()})

    def write(self, **values: Any) -> None:
        with open(self._file, "a") as lines:
            lines.write(json.dumps(values) + "\n")

    def read(self) -> dict[str, Any]:
        """Everything noted; `at` is the last thing that was begun, `end` when all was measured."""
        found: dict[str, Any] = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                with suppress(ValueError):
                    found |= json.loads(line)
        return found


def measure(overrides: Sequence[str], hosts: Sequence[str], seconds: float, folder: Path) -> None:
    """Note all rates of this rank.

    hosts    of every rank
    seconds  that each measurement lasts
    folder   on the file system of the runs; takes the notes, `RANK.jsonl`
    """
    runtime.configure_logging()
    device, notes = runtime.device(), Notes(folder, runtime.rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    notes.write(device=_name(device), kind=device.type, memory_bytes=_memory(device, hosts), at="joining the others")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=_HANG_S))
    job = jobs_config.compose("train", overrides)
    notes.rate("peak", lambda: peak_flops(device, torch.bfloat16))
    notes.rate("products_bf16", lambda: _products(device, torch.bfloat16, seconds, notes))
    notes.rate("products_fp32", lambda: _products(device, torch.float32, seconds, notes))
    notes.rate("memory", lambda: _copies(device, seconds))
    notes.rate("read", lambda: _reads(job, device, seconds))
    notes.rate("write", lambda: _writes(folder / f"{runtime.rank()}.bin", seconds))
    _networks(device, hosts, seconds, notes)
    notes.write(at="end")
    runtime.leave()


def _networks(device: torch.device, hosts: Sequence[str], seconds: float, notes: Notes) -> None:
    """Collectives within this host, between it and its neighbours in a ring of hosts, and over all."""
    names, mine = list(dict.fromkeys(hosts)), hosts[runtime.rank()]
    ranks = {name: [rank for rank, host in enumerate(hosts) if host == name] for name in names}
    if len(hosts) == 1:
        return
    within = _group(ranks[mine])
    if len(ranks[mine]) > 1:
        notes.rate("reduce_within", lambda: _all_reduces(device, within, seconds))
        notes.rate("gather_within", lambda: _all_gathers(device, within, seconds))
    for turn, pairs in enumerate(ring(names)):
        pair = next((pair for pair in pairs if mine in pair), None)
        joined = _group([rank for host in pair for rank in ranks[host]]) if pair else None
        dist.barrier()
        if pair is not None:
            other = pair[1 - pair.index(mine)]
            notes.write(at=f"all-reduce with {other}")
            notes.write(**{f"neighbour_{turn}": _all_reduces(device, joined, seconds)})
    notes.rate("reduce_over_all", lambda: _all_reduces(device, None, seconds))
    notes.rate("gather_over_all", lambda: _all_gathers(device, None, seconds))


def ring(hosts: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Pairs of neighbours in a ring, in turns in which each host is in one pair at most."""
    n = len(hosts)
    edges = [(hosts[i], hosts[(i + 1) % n]) for i in range(n if n > 2 else n - 1)]
    turns = [edges[0 : n - n % 2 : 2], edges[1::2], [edges[-1]] if n > 2 and n % 2 else []]
    return [turn for turn in turns if turn]


def _group(ranks: Sequence[int]) -> Any:
    return dist.new_group(list(ranks), timeout=timedelta(seconds=_HANG_S), use_local_synchronization=True)


def _products(device: torch.device, dtype: torch.dtype, seconds: float, notes: Notes) -> float:
    """Operations a second of square products; a result that is not the first one again is noted.

    Beside the first of them nvidia-smi looks at the GPUs, which show what they suffer from under load only.
    """
    side, looks = _SIDE[device.type], dtype is torch.bfloat16 and os.environ["LOCAL_RANK"] == "0"
    a, b = (torch.randn(side, side, generator=torch.Generator().manual_seed(i)).to(device, dtype) for i in range(2))
    first, again = torch.mm(a, b), torch.empty(side, side, device=device, dtype=dtype)
    smi = _begin_smi("clocks_event_reasons") if looks else None
    rate = 2 * side**3 * _sustained(lambda: torch.mm(a, b, out=again), device, seconds)
    if not torch.equal(first, again):
        notes.write(wrong=f"two products of the same {dtype} matrices differ: faulty arithmetic or memory")
    if smi is not None:
        notes.write(gpus=_gpus(smi))
    return rate


def _copies(device: torch.device, seconds: float) -> float:
    """Bytes a second of a kernel that reads two numbers and writes one."""
    a, b, out = (torch.ones(_COPIED[device.type], device=device) for _ in range(3))
    return 3 * a.nbytes * _sustained(lambda: torch.add(a, b, out=out), device, seconds)


def _sustained(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """How often a second."""
    _timed(work, device)
    began, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not count:
        _timed(work, device)
        count += 1
    return count / spent


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _all_reduces(device: torch.device, group: Any, seconds: float) -> float:
    """Bytes a second through each process (NCCL's busbw): an all-reduce of n bytes moves 2 (W - 1) / W n."""
    world, numbers = dist.get_world_size(group), torch.ones(_SENT[device.type], device=device)
    moved = 2 * (world - 1) / world * numbers.nbytes
    return moved * _together(lambda: dist.all_reduce(numbers, dist.ReduceOp.MAX, group), device, group, seconds)


def _all_gathers(device: torch.device, group: Any, seconds: float) -> float:
    """Bytes a second through each process: an all-gather that makes n bytes moves (W - 1) / W n."""
    world = dist.get_world_size(group)
    whole = torch.ones(_SENT[device.type] // world * world, device=device)
    part = whole[: len(whole) // world].clone()
    moved = (world - 1) / world * whole.nbytes
    return moved * _together(lambda: dist.all_gather_into_tensor(whole, part, group), device, group, seconds)


def _together(work: Callable[[], Any], device: torch.device, group: Any, seconds: float) -> float:
    """How often a second; every rank as often as the others."""
    _timed(work, device)
    once = torch.tensor(_timed(work, device), device=device)
    dist.all_reduce(once, dist.ReduceOp.MAX, group)
    count = max(1, round(seconds / float(once)))
    return count / sum(_timed(work, device) for _ in range(count))


def _reads(job: TrainJob, device: torch.device, seconds: float) -> float:
    """Samples a second, as the training reads and orders them; from memory where the kernel holds the shards."""
    if job.trains_first_stage or job.data.source is Origin.images:
        source: Any = job.data.image_source(open_images(job.data), job.seed)
    else:
        source = job.data.latent_source(job.data.open_latents(), job.seed)
    world, batch = runtime.world(), job.micro_batch
    with Loader[Any](
        source, global_batch=batch * world, micro_batch=batch, rank=runtime.rank(), world=world, device=device
    ) as loader:
        batches = loader.batches(0)
        return batch * _sustained(lambda: next(batches), device, seconds)


def _writes(file: Path, seconds: float) -> float:
    """Bytes a second of one new file, synced and removed."""
    chunk, count = os.urandom(_CHUNK), 0
    began = time.perf_counter()
    try:
        with open(file, "wb", buffering=0) as out:
            while time.perf_counter() - began < seconds and count * _CHUNK < _MOST_WRITTEN:
                out.write(chunk)
                count += 1
            os.fsync(out.fileno())
        return count * _CHUNK / (time.perf_counter() - began)
    finally:
        file.unlink(missing_ok=True)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _memory(device: torch.device, hosts: Sequence[str]) -> int:
    """Bytes of the GPU, or this process's share of the host's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total) // hosts.count(hosts[runtime.rank()])


def _begin_smi(reasons: str) -> "subprocess.Popen[str] | None":
    """Ask nvidia-smi, where there is one; `reasons` is what its drivers call the causes of slow clocks."""
    if shutil.which("nvidia-smi") is None:
        return None
    fields = ",".join([*_GPU, *(f"{reasons}.{name}" for name in SLOWDOWNS)])
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _gpus(smi: "subprocess.Popen[str]") -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU of the host: by field; of a driver before 535 in its words."""
    said, _ = smi.communicate(timeout=_SMI_S)
    if smi.returncode and (older := _begin_smi("clocks_throttle_reasons")) is not None:
        said, _ = older.communicate(timeout=_SMI_S)
        if older.returncode:
            return []
    fields = (*_GPU, *SLOWDOWNS)
    return [dict(zip(fields, row, strict=True)) for row in csv.reader(said.splitlines(), skipinitialspace=True)]
