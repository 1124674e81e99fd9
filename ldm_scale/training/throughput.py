"""How fast training is: images per second, and the share of the hardware's arithmetic that reaches the model (MFU).

MFU counts the multiply-adds that the networks need, without recomputation, against the dense peak of the compute dtype:
the vendor's figure for known GPUs, a measured matrix product elsewhere.
"""

import resource
import time
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

_BACKWARD_AND_FORWARD = 3.0  # each product of the forward pass costs two more in the backward pass
_DENSE_BF16_PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


def training_flops(forward: Callable[[], object], images: int) -> float:
    """Floating-point operations to train on one image: three times those of the forward pass of `images` images."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        forward()
    return _BACKWARD_AND_FORWARD * counter.get_total_flops() / images


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Dense operations per second of one device in `dtype`."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, peak in _DENSE_BF16_PEAKS.items():
            if known in name:
                return peak
    return _measured_peak(device, dtype)


def _measured_peak(device: torch.device, dtype: torch.dtype, side: int = 1024, repeats: int = 8) -> float:
    """Best of a few square matrix products."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        product = a @ b
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


class Meter:
    """Rates between two log lines, on this rank."""

    def __init__(self, *, flops_per_image: float, peak: float, world: int) -> None:
        self._flops_per_image, self._peak, self._world = flops_per_image, peak, world
        self._since, self._images, self._steps, self._waited = time.perf_counter(), 0, 0, 0.0

    def step(self, images: int) -> None:
        """An optimizer step over `images` images of the whole world is done."""
        self._images += images
        self._steps += 1

    def pause(self, seconds: float) -> None:
        """Leave `seconds` of evaluating or saving out of the rates."""
        self._since += seconds

    def read(self, waited_s: float) -> dict[str, float]:
        """The rates since the last reading; `waited_s` is the loader's total wait so far."""
        now = time.perf_counter()
        seconds, steps = now - self._since, max(self._steps, 1)
        rate = self._images / seconds
        waited = waited_s - self._waited
        self._since, self._images, self._steps, self._waited = now, 0, 0, waited_s
        return {
            "perf/images_per_s": rate,
            "perf/images_per_s_per_gpu": rate / self._world,
            "perf/mfu": rate / self._world * self._flops_per_image / self._peak,
            "perf/data_wait": waited / seconds,
            "perf/step_ms": 1e3 * seconds / steps,
            "perf/memory_gb": _memory_gb(),
        }


def _memory_gb() -> float:
    """Peak memory of the device, or of this process where there is no device, in 1e9 bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
