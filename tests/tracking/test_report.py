"""The report shows what the run directory holds, stays small, survives half-written runs, and draws in a browser."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking import report
from ldm_scale.tracking.grid import labelled_grid
from ldm_scale.tracking.report import write_report
from ldm_scale.tracking.tracker import JsonLines

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CAPTIONS = [f"a {c} {s} {p}" for c in ("red", "blue") for s in ("circle", "square") for p in ("top left", "centre")]


def realistic_run(path: Path, *, lines: int = 400) -> RunDir:
    """A run directory shaped like a finished toy training; its numbers are made up."""
    run_dir, rng = RunDir(path), np.random.default_rng(0)
    tracker = JsonLines(run_dir)
    tracker.start({})
    total = 96 * lines * 10
    for i in range(1, lines + 1):
        seen, part = 96 * 10 * i, i / lines
        tracker.log(
            seen,
            {
                "train/loss": 0.18 + 0.8 * math.exp(-9 * part) + 0.02 * rng.standard_normal(),
                "train/grad_norm": 0.6 * math.exp(-3 * part) + 0.08 * rng.random() + (4 if i == lines // 2 else 0),
                "train/lr": 1e-4 * min(1.0, 20 * part),
                "train/images_seen": float(seen),
                "perf/images_per_s": 412 + 9 * rng.standard_normal(),
                "perf/data_wait": 0.002 + 0.001 * rng.random(),
                "perf/memory_gb": 3.1,
                "perf/own_ms_min": 220 + rng.random(),
                "perf/own_ms_median": 232 + 3 * rng.random(),
                "perf/own_ms_max": 245 + 30 * rng.random(),
                "perf/split_data": 0.05,
                "perf/split_forward_backward": 0.95,
            },
        )
        if i % 40 == 0:
            buckets = {
                f"val/loss_t{t:03d}": 0.9 / (1 + t / 60) + 0.3 * math.exp(-5 * part) for t in range(0, 1000, 100)
            }
            scores = {"eval/fd_random": 80 * math.exp(-4 * part) + 4, "eval/caption_accuracy": 1 - math.exp(-3 * part)}
            tracker.log(seen, {"val/loss": 0.2 + 0.7 * math.exp(-8 * part), **buckets, **scores})
            tracker.event(
                seen, "evaluation", scores=scores, n=2048, reference="5f3c" * 16, weights="ema 50k images",
                sampler={"kind": "ddim", "steps": 25, "eta": 0.0}, guidance=3.0,
            )  # fmt: skip
            blur = np.linspace(0, 1, 32)[None, :, None, None] * np.ones((8, 32, 32, 3)) * 255
            noise = rng.integers(0, 256, (8, 32, 32, 3))
            images = (part * blur + (1 - part) * noise).astype(np.uint8)
            for name in ("samples/grid", "samples/reconstructions"):
                tracker.images(
                    seen, name, labelled_grid(images, CAPTIONS, columns=4), "EMA weights, DDIM 25, guidance 3"
                )
    tracker.event(total // 2, "resume", world=2, host="node07", reason="preempted: SIGUSR1")
    tracker.event(total, "alert", text='</script><b>"quoted" & tagged</b>', loss=float("nan"))
    tracker.finish("finished")
    storage.write_json(run_dir.config, {"train": {"total_images": total, "seed": 0}, "unet": {"channels": [64, 128]}})
    run_dir.write_status("finished", images=total)
    run_dir.checkpoints.mkdir()
    return run_dir


def data_of(page: Path) -> dict[str, object]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return realistic_run(tmp_path_factory.mktemp("runs") / "debug_txt2img" / "first")


def test_page_stands_alone_and_holds_the_run(run_dir):
    page = write_report(run_dir)
    text = page.read_text()
    assert page == run_dir.report and page.stat().st_size < 20_000_000
    outside = re.findall(r'(?:src|href)="(?!data:)[^#"]+"|url\((?!data:)|@import|<link[^>]+stylesheet', text)
    assert outside == [] and "/*css*/" not in text and "/*js*/" not in text
    data = data_of(page)
    assert (data["experiment"], data["name"]) == ("debug_txt2img", "first")
    assert data["images_seen"] == data["total_images"] == 384_000
    assert [item["name"] for item in data["media"]] == ["samples/grid", "samples/reconstructions"]
    assert [len(item["pictures"]) for item in data["media"]] == [10, 10]
    titles = {chart["title"]: len(chart["curves"]) for chart in data["charts"]}
    assert (
        titles["train/loss"] == 1
        and titles["val/loss_*"] == 10
        and titles["perf/own_ms_*"] == 3
        and titles["perf/split_*"] == 2
    )
    assert "train/images_seen" not in titles
    score = next(score for score in data["scores"] if score["name"] == "eval/fd_random")
    assert score["conditions"]["n"] == 2048 and score["conditions"]["sampler"]["steps"] == 25
    assert score["newest"][0] == 384_000 and score["first"][0] == 38_400
    assert data["events"][0]["text"] == '</script><b>"quoted" & tagged</b>'


@pytest.mark.parametrize("broken", ["nothing", "only config", "torn lines", "torn config", "torn picture"])
def test_half_written_runs_have_a_report(tmp_path, broken):
    run_dir = RunDir(tmp_path)
    if broken == "only config":
        storage.write_json(run_dir.config, {"seed": 1})
    elif broken == "torn lines":
        run_dir.metrics.write_text('{"images_seen": 10, "time": 1.0, "train/loss": null}\n{"images_se')
        run_dir.events.write_text('{"time": 1')
    elif broken == "torn config":
        run_dir.config.write_text('{"seed": ')
        run_dir.status.write_text("")
    elif broken == "torn picture":
        JsonLines(run_dir).images(10, "samples/grid", np.zeros((64, 64, 3), np.uint8), "")
        (picture,) = run_dir.media.glob("*/*.png")
        picture.write_bytes(picture.read_bytes()[:60])
    data = data_of(write_report(run_dir))
    assert data["charts"] == [] and data["scores"] == []


def test_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="runs/EXPERIMENT/NAME"):
        write_report(RunDir(tmp_path / "none"))


def test_long_curves_are_thinned_but_keep_their_spikes():
    points = [[x, math.sin(x / 1000)] for x in range(100_000)]
    points[31_415][1], points[77_777][1] = 50.0, -50.0
    thin = report._thinned(points)
    assert len(thin) < 1000 and thin == sorted(thin)
    assert [31_415, 50.0] in thin and [77_777, -50.0] in thin
    assert thin[0] == points[0] and thin[-1] == points[-1]
    assert report._thinned(points[:100]) == points[:100]


def test_too_many_pictures_are_left_out_evenly(tmp_path, monkeypatch):
    run_dir, rng = RunDir(tmp_path), np.random.default_rng(0)
    for seen in range(0, 400, 10):
        JsonLines(run_dir).images(seen, "samples/grid", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "")
    monkeypatch.setattr(report, "_PICTURE_BYTES", 9 * 13_000)
    (viewer,) = report._media(run_dir.media)
    seen = [picture["images_seen"] for picture in viewer["pictures"]]
    assert seen[0] == 0 and seen[-1] == 390 and len(seen) == 9 and viewer["left_out"] == 31
    assert max(np.diff(seen)) <= 60


def test_large_pictures_are_packed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), dtype=np.uint8)
    JsonLines(RunDir(tmp_path)).images(0, "samples/grid", noise, "noise")
    (path,) = (tmp_path / "media").glob("*/*.png")
    picture, size = report._embedded(path)
    assert picture["url"].startswith("data:image/webp") and size < path.stat().st_size / 2
    assert picture["caption"] == "noise" and picture["width"] == 1600


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 100])
def test_every_picture_has_its_turn(count):
    assert sorted(report._coarse_to_fine(count)) == list(range(count))


def chromium(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 500])
def test_browser_draws_the_page_without_errors(run_dir, tmp_path, width):
    page, shot = write_report(run_dir), tmp_path / "report.png"
    done = chromium(page, tmp_path, f"--window-size={width},2400", f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(shot) as image:
        assert image.width == width and len(image.convert("RGB").getcolors(1 << 24) or []) > 100


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_browser_builds_every_section(run_dir, tmp_path):
    done = chromium(write_report(run_dir), tmp_path, "--dump-dom")
    body = done.stdout.split('<script id="data"')[0]
    for section in ("scores", "media", "curves", "events", "config", "files"):
        assert re.search(rf'<section id="{section}"[^>]*><h2>', body), section
    assert body.count('<div class="chart">') == len(data_of(run_dir.report)["charts"])
    assert "<b>&quot;quoted" not in body and "&lt;/script&gt;&lt;b&gt;" in body
