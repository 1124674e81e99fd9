"""Rates and shares, on a clock that is held; operations of a U-Net, counted by hand."""

import time

import pytest
import tiny
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm_scale.core import traffic
from ldm_scale.nn.unet import UNet, UNetConfig
from ldm_scale.tracking.goodput import Ledger
from ldm_scale.training import telemetry, throughput
from ldm_scale.training.telemetry import STEP_PARTS, Ranks
from ldm_scale.training.throughput import Meter

UNET = UNetConfig(
    in_channels=4, out_channels=4, model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[2, 1],
    num_heads=4, context_dim=24, norm_groups=16,
)  # fmt: skip


def by_hand(unet: nn.Module, *inputs: torch.Tensor) -> int:
    """Two operations for each product of a convolution, a linear layer, or attention; from shapes alone."""
    sides: dict[str, torch.Size] = {}
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for name, module in layers.items():
        module.register_forward_hook(lambda module, _, output, name=name: sides.update({name: output.shape}))
    unet(*inputs)
    found = 0
    for name, module in layers.items():
        if isinstance(module, nn.Conv2d):
            found += 2 * sides[name].numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        if isinstance(module, nn.Linear):
            found += 2 * sides[name].numel() * module.in_features
        if name.endswith("to_k"):  # every query meets every key, and then every value
            batch, keys, width = sides[name]
            found += 2 * 2 * batch * keys * width * sides[name.removesuffix("k") + "q"][1]
    return found


def test_operations_of_a_unet_are_those_counted_by_hand_and_those_of_a_whole_step() -> None:
    with torch.device("meta"):
        unet, z, t, context = UNet(UNET), torch.empty(2, 4, 16, 16), torch.zeros(2), torch.empty(2, 5, 24)
    found = throughput.training_flops(lambda: unet(z, t, context), images=2)
    with FlopCounterMode(display=False) as counter:
        unet(z, t, context).sum().backward()
    assert found == pytest.approx(counter.get_total_flops() / 2, rel=0.02)  # of which the first layers need no gradient
    assert found == 3 * by_hand(unet, z, t, context) / 2


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12), ("NVIDIA GB200", 2500e12), ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA RTX A1000", None),
    ],
)  # fmt: skip
def test_peaks_are_known_by_whole_names(name: str, peak: float | None) -> None:
    assert throughput.published_peak(name) == peak


def test_peak_is_a_plausible_rate() -> None:
    assert 1e8 < throughput.peak_flops(torch.device("cpu"), torch.float32) < 1e14


class Clock:
    """Time goes on only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(telemetry.time, "perf_counter", lambda: self.now)

    def after(self, seconds: float, meter: Meter, part: str) -> None:
        self.now += seconds
        meter.mark(part)


def a_meter() -> Meter:
    engine = tiny.engine_of("one_process")
    ranks = Ranks(engine, straggler=0.15, straggler_intervals=3)
    return Meter(engine, ranks, Ledger(time.time()), flops_per_image=10.0, peak=1000.0)


def test_rates_are_of_the_time_that_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = a_meter()
    for _ in range(4):
        clock.after(0.1, meter, "data")
        clock.after(0.5, meter, "forward_backward")
        clock.after(0.1, meter, "communication")
        clock.after(0.2, meter, "optimizer")
        meter.step(50)
    with meter.pause("evaluation"):
        clock.now += 1000
    clock.after(0.4, meter, "ema")
    read = meter.read(20_000_000)
    assert read["perf/images_per_s"] == pytest.approx(50) and read["perf/read_mb_per_s"] == pytest.approx(5)
    assert read["perf/mfu"] == pytest.approx(50 * 10 / 1000)
    assert read["perf/data_wait"] == pytest.approx(0.1)
    assert read["perf/step_ms"] == pytest.approx(1000)
    assert read["perf/own_ms"] == pytest.approx(600)  # data, forward and backward
    split = [read[f"perf/split_{part}"] for part in STEP_PARTS]
    assert split == pytest.approx([0.1, 0.5, 0.1, 0.2, 0.1, 0.0])
    assert meter.ledger.seconds["evaluation"] == 1000 and meter.ledger.seconds["train"] == pytest.approx(3.6)
    assert not {"perf/cache_hits", "perf/retries"} & read.keys(), "nothing is remote"
    meter.step(50)
    clock.after(1.0, meter, "forward_backward")
    traffic.count(read=400, fetched=100, retries=2)
    later = meter.read(23_000_000)
    assert later["perf/data_wait"] == 0 and later["perf/read_mb_per_s"] == pytest.approx(3)
    assert (later["perf/cache_hits"], later["perf/retries"]) == (0.75, 2)


def test_an_engine_tells_what_has_ended() -> None:
    engine, heard = tiny.engine_of("one_process"), list[str]()
    engine.mark = heard.append
    x, y = tiny.samples(torch.arange(2))
    for _ in range(engine.accumulation):
        with engine.accumulate():
            engine.backward(engine.model(x, y).mean())
            engine.step(1e-3)
    assert heard == ["forward_backward", "communication"] * engine.accumulation + ["optimizer"]
