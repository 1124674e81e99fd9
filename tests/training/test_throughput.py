import pytest
import torch
from torch import nn

from ldm_scale.training import throughput


def test_training_flops_are_three_times_the_forward_pass() -> None:
    with torch.device("meta"):
        linear, x = nn.Linear(8, 16), torch.empty(5, 8)
    assert throughput.training_flops(lambda: linear(x), images=5) == 3 * 2 * 8 * 16


def test_peak_is_a_plausible_rate() -> None:
    assert 1e8 < throughput.peak_flops(torch.device("cpu"), torch.float32) < 1e14


def test_meter_divides_by_the_time_that_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    meter = throughput.Meter(flops_per_image=10.0, peak=1000.0, world=2)
    for _ in range(4):
        meter.step(50)
    now += 5.0
    meter.pause(1.0)
    read = meter.read(waited_s=0.4)
    assert read["perf/images_per_s"] == 50
    assert read["perf/images_per_s_per_gpu"] == 25
    assert read["perf/mfu"] == pytest.approx(25 * 10 / 1000)
    assert read["perf/data_wait"] == pytest.approx(0.1)
    assert read["perf/step_ms"] == 1000
    meter.step(50)
    now += 1.0
    assert meter.read(waited_s=0.4)["perf/data_wait"] == 0
