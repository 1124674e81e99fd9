"""What a GPU says of itself beside the work that it does: power, clock, temperature, memory errors.

NVIDIA's driver is asked (NVML). A training goes on without it: where it is out of reach when a training begins, no rank
asks, and that is logged once; what it cannot tell later is left out.
"""

import math
from collections.abc import Callable
from typing import Any

import pynvml
import torch

from ldm_scale.core import runtime

log = runtime.logger(__name__)

_QUESTIONS: dict[str, Callable[[Any], float]] = {
    "gpu_power_w": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
    "gpu_clock_mhz": lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
    "gpu_temperature_c": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    "gpu_ecc_errors": lambda gpu: pynvml.nvmlDeviceGetTotalEccErrors(
        gpu, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    ),
}


class Sensors:
    """Of one rank's GPU; a rank without a GPU has none to read."""

    def __init__(self, device: torch.device) -> None:
        """Find `device` by its UUID, since CUDA_VISIBLE_DEVICES renumbers. Collective."""
        self._gpu: Any = None
        lacking = ""
        if device.type == "cuda":
            try:
                pynvml.nvmlInit()
                uuid = torch.cuda.get_device_properties(device).uuid
                self._gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            except pynvml.NVMLError as error:
                lacking = str(error)
        if reason := next(filter(None, runtime.gathered(lacking)), ""):
            self._gpu = None  # of any rank, since all tell the same names
            log.warning("power, clocks and temperature of the GPUs are not logged: %s", reason)

    def read(self) -> dict[str, float]:
        """`gpu_power_w` (W), `gpu_clock_mhz` (of the multiprocessors), `gpu_temperature_c` and `gpu_ecc_errors`
        (uncorrected ones since the driver was loaded); NaN for what this GPU does not tell."""
        if self._gpu is None:
            return {}
        return {name: _answer(question, self._gpu) for name, question in _QUESTIONS.items()}


def _answer(question: Callable[[Any], float], gpu: Any) -> float:
    try:
        return float(question(gpu))
    except pynvml.NVMLError:
        return math.nan
