"""What the README says of the flagship's cost is what `plan` says."""

import json
import re
from pathlib import Path

import pytest

from ldm_scale.jobs import plan

README = (Path(__file__).parents[2] / "README.md").read_text()


def said(pattern: str) -> tuple[str, ...]:
    found = re.search(pattern, " ".join(README.split()))
    assert found, pattern
    return found.groups()


@pytest.mark.slow
def test_the_plan_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(["+experiment=txt2img_laion", "data.latents=x", "data.validation=x", "--json"])
    found = json.loads(capsys.readouterr().out)
    hours = {scale["step"]["world"]: scale["gpu_hours"] for scale in found["scales"]}
    on_8, days, on_64, on_64_h = said(r"(\d+) GPU hours on 8 H100 \(([\d.]+) days\), or (\d+) on 64 \((\d+) hours")
    assert (on_8, days) == (f"{hours[8]:.0f}", f"{hours[8] / 8 / 24:.1f}")
    assert (on_64, on_64_h) == (f"{hours[64]:.0f}", f"{hours[64] / 64:.0f}")
    encoding, cached, checkpoint = said(r"([\d.]+) GPU hours and (\d+) GB per million images, a checkpoint (\d+) GB")
    assert encoding == f"{found['encoding_hours_per_million']:.2f}"
    assert (cached, checkpoint) == (
        f"{found['cached_bytes_per_image'] * 1e6 / 1e9:.0f}", f"{found['checkpoint_bytes'] / 1e9:.0f}"
    )  # fmt: skip
