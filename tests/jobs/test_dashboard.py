"""The panels: their table in the documentation, their order, and the workspace that W&B is given, without a network."""

import json
from pathlib import Path
from typing import Any

import pytest

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import dashboard, report
from ldm_scale.tracking.panels import OTHERS, PANELS, SECTIONS, layout, section
from ldm_scale.tracking.tracker import JsonLines

PAGE = Path(__file__).parents[2] / "docs" / "dashboard.md"
NAMES = {"val/loss", "val/loss_t000", "val/loss_raw", "val/loss_raw_t000", "val/loss_ema9000", "mine/own", "train/lr"}


def test_the_page_has_the_table() -> None:
    assert dashboard.table() in PAGE.read_text(), (
        "put `python -m ldm_scale.jobs.dashboard --table` into docs/dashboard.md"
    )


def test_every_name_has_one_panel_and_unknown_ones_come_last() -> None:
    filled = layout(NAMES)
    assert sorted(name for _, own in filled for name in own) == sorted(NAMES)
    assert [own for panel, own in filled if panel.code == "C12"] == [["val/loss_t000"], ["val/loss_raw_t000"]]
    assert (section(filled[-1][0]), filled[-1][1]) == (OTHERS, ["mine/own"])
    assert [panel.code[0] for panel in PANELS] == sorted(panel.code[0] for panel in PANELS)
    assert {panel.code[0] for panel in PANELS} == SECTIONS.keys()


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path / "run")
    tracker = JsonLines(made)
    tracker.start({})
    tracker.log(8, {"train/images_seen": 8.0, "perf/hours": 0.1, "perf/images_per_s": 3.0, **dict.fromkeys(NAMES, 1.0)})
    tracker.event(8, "resume", world=1)
    storage.write_json(made.config, {"tracker": {"project": "study", "entity": None}})
    return made


def metrics_of(spec: Any) -> set[str]:
    """Names that the panels of a workspace show."""
    sections = spec["section"]["panelBankConfig"]["sections"]
    configs = [panel["config"] for part in sections for panel in part["panels"]]
    return {name for config in configs for key in ("metrics", "mediaKeys") for name in config.get(key, [])}


def test_without_a_network_the_workspace_is_written(
    run_dir: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "dashboard.json"
    assert dashboard.main([str(run_dir.path), "--out", str(out)]) == 0
    assert f"after `wandb login`:  python -m ldm_scale.jobs.dashboard {run_dir.path}" in capsys.readouterr().out
    spec = json.loads(out.read_text())
    assert metrics_of(spec) == dashboard.logged(run_dir) - {"train/images_seen"}
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [part["name"][0] for part in sections] == ["A", "B", "C", "E", "E", "G", "O", "G"]
    titles = [panel["config"].get("chartTitle", "") for part in sections for panel in part["panels"]]
    assert "E19 Throughput (images/s)" in titles, titles
    axes = {part["name"]: part["panels"][0]["config"].get("xAxis") for part in sections}
    assert (axes["E. Speed"], axes["E. Speed, over hours"]) == ("train/images_seen", "perf/hours")


def test_runs_that_say_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dashboard.main([str(tmp_path)]) == 2
    assert report.main([str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line[:6] for line in said] == ["error:"] * 2 and str(tmp_path) in said[0]
