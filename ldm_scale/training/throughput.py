"""How fast training is: images per second, the share of the hardware's arithmetic that reaches the model (MFU), and
what the time goes to.

MFU counts the multiply-adds that the networks need, without recomputation, against the dense peak of the compute dtype:
the vendor's figure for known GPUs, a measured matrix product elsewhere.
"""

import math
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping

import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm_scale.core import traffic
from ldm_scale.core.traffic import Traffic
from ldm_scale.tracking.goodput import Ledger
from ldm_scale.training.engine import Engine, EngineKind
from ldm_scale.training.sensors import Sensors
from ldm_scale.training.telemetry import STEP_PARTS, Ranks, Straggler, Timeline

_BACKWARD_AND_FORWARD = 3.0  # each product of the forward pass costs two more in the backward pass
_RANGE: dict[str, Callable[[list[float]], float]] = {"min": min, "median": statistics.median_low, "max": max}
_WORST_IS_LEAST = ("gpu_clock_mhz", "read_mb_per_s", "cache_hits")
_DENSE_BF16_PEAKS = {  # by words of the device's name; variants before what they are variants of
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "A100": 312e12, "H100": 989e12, "H200": 989e12,
    "GH200": 989e12, "B200": 2250e12, "GB200": 2500e12, "GB300": 2500e12, "L40S": 362e12,
}  # fmt: skip
_SIDE, _PRODUCTS = {"cpu": 1024, "cuda": 8192}, {"cpu": 1, "cuda": 4}  # on a GPU small ones wait for Python


def training_flops(forward: Callable[[], object], images: int) -> float:
    """Floating-point operations to train on one image: three times those of the forward pass of `images` images."""
    return _BACKWARD_AND_FORWARD * forward_flops(forward) / images


def forward_flops(forward: Callable[[], object]) -> float:
    """Floating-point operations of a call, without gradients."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return float(counter.get_total_flops())


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Dense operations per second of one device in `dtype`."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        peak = published_peak(torch.cuda.get_device_name(device))
        if peak is not None:
            return peak
    return _measured_peak(device, dtype)


def published_peak(name: str) -> float | None:
    """The vendor's dense bfloat16 operations per second of the GPU of this name; None for one of no known kind."""
    words = set(re.split("[ -]", name))
    if "MIG" in words:  # a slice of one
        return None
    return next((peak for known, peak in _DENSE_BF16_PEAKS.items() if words.issuperset(known.split())), None)


def _measured_peak(device: torch.device, dtype: torch.dtype, repeats: int = 8) -> float:
    """Best of a few square matrix products."""
    side, products = _SIDE[device.type], _PRODUCTS[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    timeline, best = Timeline(device), math.inf
    for _ in range(repeats):
        timeline.restart()
        for _ in range(products):
            torch.mm(a, b, out=out)
        timeline.mark("products")
        best = min(best, timeline.read()["products"])
    return 2 * side**3 * products / best


class Meter:
    """Rates and shares between two log lines."""

    def __init__(self, engine: Engine, ranks: Ranks, ledger: Ledger, *, flops_per_image: float, peak: float) -> None:
        """Listen to `engine` from here on. Collective.

        ledger           the run's, which rank 0 keeps
        flops_per_image  to train on it
        peak             operations per second of one device
        """
        self.ledger, self._ranks, self._world = ledger, ranks, engine.world
        self._flops_per_image, self._peak = flops_per_image, peak
        self._waits_within = engine.kind in (EngineKind.zero2, EngineKind.zero3)
        self._timeline, self._sensors = Timeline(engine.device), Sensors(engine.device)
        self.mark, self.pause = self._timeline.mark, self._timeline.pause
        engine.mark = self.mark
        self.straggler: Straggler | None = None
        """Found by the last reading."""
        self.step_s = 0.0
        """Seconds of a step, by the last reading; 0 before the first."""
        self._bytes_read, self._traffic = 0, traffic.so_far()
        self.restart()

    def restart(self) -> None:
        """Begin here; what came since the last reading is in no rate."""
        self._timeline.restart()
        self._images, self._steps = 0, 0

    def step(self, images: int) -> None:
        """An optimizer step over `images` images of the whole world is done."""
        self._images += images
        self._steps += 1

    def read(self, bytes_read: int) -> dict[str, float]:
        """Rates and shares since the last reading, and goodput so far. Collective; waits for the device.

        bytes_read  of data, by this rank so far
        """
        spent = self._timeline.read()
        self.ledger.add(spent)
        split = {part: spent.get(part, 0.0) for part in STEP_PARTS}
        if self._waits_within:
            split["forward_backward"] += split.pop("communication")
        seconds, steps = sum(split.values()), max(self._steps, 1)
        rate, self.step_s = self._images / seconds, seconds / steps
        read_mb = (bytes_read - self._bytes_read) / 1e6
        now = traffic.so_far()
        asked, self._traffic = now.since(self._traffic), now
        self._images, self._steps, self._bytes_read = 0, 0, bytes_read
        return {
            "perf/images_per_s": rate,
            "perf/images_per_s_per_gpu": rate / self._world,
            "perf/mfu": rate / self._world * self._flops_per_image / self._peak,
            "perf/step_ms": 1e3 * self.step_s,
            **{f"perf/split_{part}": share / seconds for part, share in split.items()},
            **self._of_ranks(split, seconds, steps, read_mb, asked),
            **self.ledger.shares(time.time()),
        }

    def _of_ranks(
        self, split: Mapping[str, float], seconds: float, steps: int, read_mb: float, asked: Traffic
    ) -> dict[str, float]:
        """What differs between ranks: the worst of all, and where there are several their range."""
        # Free of waiting for others: the passes too, where an engine communicates only after them.
        own = split["data"] + (0.0 if self._waits_within else split["forward_backward"])
        found = self._ranks.gather(
            {
                "own_ms": 1e3 * own / steps,
                "data_wait": split["data"] / seconds,
                "read_mb_per_s": read_mb / seconds,
                "cache_hits": asked.hits,
                "retries": float(asked.retries) if asked.read or asked.retries else math.nan,
                "memory_gb": _memory_gb(),
                "host_gb": psutil.Process().memory_info().rss / 1e9,
                **self._sensors.read(),
            }
        )
        own_ms = found["own_ms"]
        self.straggler = self._ranks.straggler(own_ms, 1e3 * seconds / steps)
        slowest = {} if self._world == 1 else {"perf/slowest_rank": float(own_ms.index(max(own_ms)))}
        return worst_of(found) | slowest


def worst_of(found: Mapping[str, list[float]]) -> dict[str, float]:
    """`perf/NAME` of the worst rank, and where there are several `perf/NAME_min`, `_median` and `_max`.

    found  by name what every rank has; NaN where a rank does not know, and what none knows is left out
    """
    told: dict[str, float] = {}
    for name, everyone in found.items():
        if known := [value for value in everyone if not math.isnan(value)]:
            told[f"perf/{name}"] = (min if name in _WORST_IS_LEAST else max)(known)
            if len(everyone) > 1:
                told |= {f"perf/{name}_{which}": of(known) for which, of in _RANGE.items()}
    return told


def _memory_gb() -> float:
    """Peak memory of the device, or of this process where there is no device, in 1e9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
