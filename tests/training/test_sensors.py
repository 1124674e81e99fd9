"""What GPUs say of themselves: here, that nobody asks where nobody can answer; and whose numbers count."""

import logging
import math

import pynvml
import pytest
import torch

from ldm_scale.training.sensors import Sensors
from ldm_scale.training.throughput import worst_of


def test_a_cpu_has_nothing_to_tell(caplog: pytest.LogCaptureFixture) -> None:
    assert Sensors(torch.device("cpu")).read() == {} and caplog.text == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without NVIDIA's driver")
def test_without_a_driver_training_goes_on_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(pynvml.NVMLError):
        pynvml.nvmlInit()
    with caplog.at_level(logging.WARNING):
        sensors = Sensors(torch.device("cuda", 0))
    assert "not logged: NVML Shared Library Not Found" in caplog.text and len(caplog.records) == 1
    assert sensors.read() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="for a machine with a GPU")
def test_a_gpu_tells_plausible_numbers() -> None:
    read = Sensors(torch.device("cuda", 0)).read()
    assert (
        10 < read["gpu_power_w"] < 2000 and 100 < read["gpu_clock_mhz"] < 5000 and 10 < read["gpu_temperature_c"] < 110
    )


def test_the_worst_rank_counts_the_slowest_clock_and_nobody_who_does_not_know() -> None:
    found = {
        "gpu_clock_mhz": [1980.0, 1200.0, math.nan],
        "gpu_power_w": [300.0, 700.0, 500.0],
        "gpu_ecc": [math.nan] * 3,
    }
    told = worst_of(found)
    assert told["perf/gpu_clock_mhz"] == 1200 and told["perf/gpu_clock_mhz_max"] == 1980
    assert (told["perf/gpu_power_w"], told["perf/gpu_power_w_min"]) == (700, 300)
    assert not any("ecc" in name for name in told)
    assert worst_of({"gpu_power_w": [300.0]}) == {"perf/gpu_power_w": 300}
