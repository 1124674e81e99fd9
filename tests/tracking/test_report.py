"""The report shows what the run directory holds, stays small, survives half-written runs, and draws in a browser."""

import html
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
from ldm_scale.tracking.report import write_comparison, write_report
from ldm_scale.tracking.tracker import JsonLines

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CAPTIONS = [f"a {c} {s} {p}" for c in ("red", "blue") for s in ("circle", "square") for p in ("top left", "centre")]


def realistic_run(path: Path, *, lines: int = 400, seed: int = 0) -> RunDir:
    """A run directory shaped like a finished toy training; its numbers are made up."""
    run_dir, rng = RunDir(path), np.random.default_rng(seed)
    tracker = JsonLines(run_dir)
    tracker.start({})
    tracker.event(0, "start", world=2)
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
    storage.write_json(run_dir.config, {"total_images": total, "seed": seed, "unet": {"channels": [64, 128]}})
    run_dir.write_status("finished", images=total)
    code = {"commit": "c0ffee" * 5, "dirty": False}
    launch = {
        "time": 1e9,
        "images_seen": 0,
        "host": "node07",
        "code": code,
        "packages": {"torch": "2.11", "rich": "13"},
    }
    storage.write_json(run_dir.repro, {"launches": [launch]})
    run_dir.checkpoints.mkdir()
    scores = {1.0: {"eval/fd_random": 9.5, "eval/caption_accuracy": 0.5}, 3.0: {"eval/fd_random": 7.25}}
    points = [{"guidance": guidance, "scores": one} for guidance, one in scores.items()]
    real, conditions = {"eval/caption_accuracy_real": 0.96875}, {"n": 512, "sampler": {"kind": "ddim"}}
    swept = {"points": points, "real": real, "conditions": conditions}
    storage.write_json(run_dir.evaluation / "384000_ema_guidance.json", swept)
    Image.fromarray(noise[0].astype(np.uint8)).save(run_dir.evaluation / "384000_ema_guidance.png")
    storage.write_json(run_dir.evaluation / "384000_ema_5f3c.json", {"scores": {"eval/fid": 12.5}})
    storage.write_json(run_dir.evaluation / "of_another_kind.json", {"scale": 1})
    return run_dir


def data_of(page: Path) -> dict[str, object]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def chromium(page: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        "--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (make system-packages)")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return realistic_run(tmp_path_factory.mktemp("runs") / "debug_txt2img" / "first")


@pytest.fixture(scope="module")
def several(run_dir: RunDir) -> list[RunDir]:
    return [run_dir, realistic_run(run_dir.path.with_name("second"), lines=200, seed=1)]


def test_page_stands_alone_and_holds_the_run(run_dir):
    page = write_report(run_dir)
    text = page.read_text()
    assert page == run_dir.report and page.stat().st_size < 20_000_000
    outside = re.findall(r'(?:src|href)="(?!data:)[^#"]+"|url\((?!data:)|@import|<link[^>]+stylesheet', text)
    assert outside == [] and "/*css*/" not in text and "/*js*/" not in text
    data = data_of(page)
    (run,) = data["runs"]
    assert (run["experiment"], run["name"]) == ("debug_txt2img", "first")
    assert run["images_seen"] == run["total_images"] == 384_000
    assert [item["name"] for item in run["media"][:2]] == ["samples/grid", "samples/reconstructions"]
    assert [len(item["pictures"]) for item in run["media"]] == [10, 10, 1]
    assert "train/images_seen" not in run["curves"]
    score = next(score for score in run["scores"] if score["name"] == "eval/fd_random")
    assert score["conditions"]["n"] == 2048 and score["conditions"]["sampler"]["steps"] == 25
    assert score["newest"][0] == 384_000 and score["first"][0] == 38_400
    assert run["events"][0]["text"] == '</script><b>"quoted" & tagged</b>'
    assert run["launches"][0]["packages"] == {"torch": "2.11"} and run["clock"][-1][0] == 384_000
    assert {file["link"] for file in run["files"]} >= {"metrics.jsonl", "repro.json", "media"}


def test_what_evaluate_found_is_there_by_what_its_files_hold(run_dir):
    (run,) = data_of(write_report(run_dir))["runs"]
    single, swept = run["evaluations"]
    assert single["rows"] == [{"name": "scores", "scores": {"eval/fid": 12.5}}]
    assert [row["name"] for row in swept["rows"]] == ["guidance 1", "guidance 3", "real images"]
    assert swept["rows"][2]["scores"] == {"eval/caption_accuracy": 0.96875} and swept["conditions"]["n"] == 512
    assert run["media"][2]["name"] == swept["name"] == "evaluation/384000_ema_guidance"


def test_panels_come_in_the_dashboards_order(run_dir):
    panels = data_of(write_report(run_dir))["panels"]
    assert [panel["section"][0] for panel in panels] == sorted(panel["section"][0] for panel in panels)
    names = {panel["title"]: panel["names"] for panel in panels}
    assert names["C12 Validation loss by timestep"] == [f"val/loss_t{t:03d}" for t in range(0, 1000, 100)]
    assert (
        len(names["E21 Time of a step (ms)"]) == 3 and len(names["E20 Where a step's time goes (share of time)"]) == 2
    )
    assert names["D17 Samples, fixed captions and noise"] == ["samples/grid"]


def test_several_runs_side_by_side_begin_with_their_differences(run_dir, several, tmp_path):
    data = data_of(write_comparison(several, tmp_path / "comparison.html"))
    assert [run["name"] for run in data["runs"]] == ["first", "second"]
    differences = {difference["key"]: difference["values"] for difference in data["differences"]}
    assert differences == {"seed": [0, 1], "total_images": [384_000, 192_000]}
    with pytest.raises(ValueError, match="two runs or more"):
        write_comparison([run_dir], tmp_path / "comparison.html")


def test_hours_follow_images_and_leave_out_what_nobody_ran(tmp_path):
    """Two processes for an hour, none for ten, one for half an hour; a watcher scores for another day."""
    run_dir = RunDir(tmp_path)
    events = [
        {"event": "start", "time": 0.0, "world": 2, "images_seen": 0},
        {"event": "resume", "time": 39_600.0, "world": 1, "images_seen": 20},
    ]
    lines = [{"images_seen": seen, "time": at} for seen, at in ((10, 1800.0), (20, 3600.0), (30, 41_400.0))]
    scored = [{"event": "evaluation", "images_seen": 20, "time": 9e4, "scores": {"eval/fid": 9.0}}]
    run_dir.watched.parent.mkdir()
    for file, held in ((run_dir.metrics, lines), (run_dir.events, events), (run_dir.watched, scored)):
        file.write_text("".join(json.dumps(line) + "\n" for line in held))
    storage.write_json(run_dir.status, {"state": "running", "reason": "", "images": 0, "time": 0.0})
    (run,) = data_of(write_report(run_dir))["runs"]
    assert run["clock"] == [[0, 0, 0], [10, 1, 0.5], [20, 2, 1], [30, 2.5, 11.5]] and run["cost"]["spent"] == 2.5
    assert run["state"] == "stale" and run["curves"]["eval/fid"] == [[20, 9]]


@pytest.fixture(scope="module")
def foretold(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run of the paper's text-to-image experiment whose plan was kept, at 2.5 a GPU hour."""
    run_dir = realistic_run(tmp_path_factory.mktemp("runs") / "txt2img_laion" / "planned", lines=80)
    JsonLines(run_dir).log(76_800, {"eval/fid": 40.0, "eval/fid_raw": 44.0, "eval/fid_clean": 41.0, "eval/kid": 0.01})
    scales = [
        {"step": {"world": world, "images_per_s": 250.0 * world}, "mfu": 0.4, "gpu_hours": 30.0} for world in (1, 2, 8)
    ]
    storage.write_json(run_dir.plan, {"machine": {"name": "H100"}, "scales": scales})
    storage.write_json(run_dir.config, {"total_images": 100_000, "tracker": {"gpu_hour_price": 2.5}})
    return run_dir


def test_curves_are_held_against_the_paper_and_the_plan_of_as_many_gpus(foretold, run_dir):
    (run,) = data_of(write_report(foretold))["runs"]
    paper = [level for level in run["levels"] if "paper" in level["label"]]
    assert {level["name"] for level in paper} == {"eval/fid", "eval/fid_raw"}
    assert {(level["value"], level["label"].split(", ")[1]) for level in paper} == {
        (23.31, "no guidance"),
        (12.63, "guidance 1.5"),
    }
    assert [level for level in run["levels"] if level not in paper] == [
        {"name": "perf/images_per_s", "label": "plan: 2 x H100", "value": 500.0}
    ]
    assert run["cost"]["planned"] == 30 and run["cost"]["price"] == 2.5
    assert data_of(write_report(run_dir))["runs"][0]["levels"] == []


@pytest.mark.slow
@needs_chromium
def test_browser_draws_dashed_lines_and_the_cost(foretold, several, tmp_path):
    body = chromium(write_report(foretold), tmp_path, "--dump-dom").stdout
    assert body.count('class="level"') == 3 and "paper: 30k of MS-COCO, guidance 1.5: 12.63" in body
    assert re.search(r"<dt>Cost</dt><dd>[^<]* at completion, 75 planned", body)
    both = chromium(
        write_comparison([foretold, several[0]], tmp_path / "comparison.html"), tmp_path, "--dump-dom"
    ).stdout
    assert both.count('class="level"') == 5  # a chart for each name: fid, fid_raw, images per second


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
    (run,) = data_of(write_report(run_dir))["runs"]
    assert run["curves"] == {} and run["scores"] == []


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


def test_too_many_pictures_are_left_out_evenly(tmp_path):
    run_dir, rng = RunDir(tmp_path), np.random.default_rng(0)
    for seen in range(0, 400, 10):
        JsonLines(run_dir).images(seen, "samples/grid", rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), "")
    ((paths),) = report._pictures(run_dir).values()
    (pictures,) = report._packed([paths], 9 * 13_000)
    seen = [picture["images_seen"] for picture in pictures]
    assert seen[0] == 0 and seen[-1] == 390 and len(seen) == 9
    assert max(np.diff(seen)) <= 60


def endless_run(path: Path) -> RunDir:
    """More of everything than any page takes: 40 MB of pictures, curves by the hundred, long events, many launches."""
    run_dir, noise = RunDir(path), np.random.default_rng(0).integers(0, 256, (340, 340, 3), dtype=np.uint8)
    for name in ("samples/grid", "samples/reconstructions"):
        JsonLines(run_dir).images(0, name, noise, "noise")
        first = run_dir.picture(name, 0)
        for seen in range(1, 60):
            shutil.copy(first, run_dir.picture(name, seen))
    storage.write_json(run_dir.config, {"total_images": 6000})
    with open(run_dir.metrics, "w") as lines:
        for seen in range(900):
            values = {f"train/part_{part}": math.sin(seen * part) for part in range(150)}
            lines.write(json.dumps({"images_seen": seen, "time": float(seen), **values}) + "\n")
    with open(run_dir.events, "w") as lines:
        for seen in range(400):
            event = {"time": float(seen), "images_seen": seen, "event": "trouble", "samples": ["key"] * 3000}
            lines.write(json.dumps(event) + "\n")
    launch = {"time": 0.0, "images_seen": 0, "host": "node07", "command": ["x" * 4000], "packages": {}}
    storage.write_json(run_dir.repro, {"launches": [launch] * 700})
    return run_dir


@pytest.mark.slow
def test_the_page_stays_below_20_mb_however_long_the_run(tmp_path):
    run_dir = endless_run(tmp_path / "debug" / "endless")
    stored = sum(path.stat().st_size for path in run_dir.media.rglob("*.png"))
    assert stored > 40e6
    page = write_report(run_dir)
    assert page.stat().st_size < 20_000_000
    (run,) = data_of(page)["runs"]
    for viewer in run["media"]:
        seen = [picture["images_seen"] for picture in viewer["pictures"]]
        assert seen[0] == 0 and seen[-1] == 59 and len(seen) + viewer["left_out"] == 60 and viewer["left_out"] > 30
        assert max(np.diff(seen)) <= 8, "left out evenly"
    assert run["events"][0]["images_seen"] == 399 and run["events_left_out"] == 400 - len(run["events"])
    assert run["launches_left_out"] == 700 - len(run["launches"]) > 0
    assert len(run["curves"]) == 150
    comparison = write_comparison([run_dir] * 3, tmp_path / "comparison.html")
    assert comparison.stat().st_size < 20_000_000
    assert all(len(viewer["pictures"]) > 1 for run in data_of(comparison)["runs"] for viewer in run["media"])


def test_large_pictures_are_packed(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), dtype=np.uint8)
    JsonLines(RunDir(tmp_path)).images(0, "samples/grid", noise, "noise")
    path = RunDir(tmp_path).picture("samples/grid", 0)
    ((picture,),) = report._packed([[path]], 4_000_000)
    assert picture["url"].startswith("data:image/webp") and len(picture["url"]) < path.stat().st_size / 2
    assert picture["caption"] == "noise" and (picture["width"], picture["drawn"]) == (1600, 1700)


def test_pictures_of_many_runs_are_packed_smaller_until_each_has_some(tmp_path, monkeypatch):
    """15 runs with a small grid and a tall page each, all a tenth of their size; what does not fit is counted."""
    small = {"_PICTURE_BYTES": 400_000, "_ONE_PICTURE_BYTES": 4_000, "_PACKINGS": ((160, 85), (120, 80), (90, 60))}
    for name, value in small.items():
        monkeypatch.setattr(report, name, value)
    noise = np.random.default_rng(0).integers(0, 256, (400, 180, 3), dtype=np.uint8)
    runs = [RunDir(tmp_path / "study" / str(i)) for i in range(15)]
    for name, pixels in (("samples/grid", noise[:30, :30]), ("samples/prompts", noise)):
        JsonLines(runs[0]).images(0, name, pixels, "")
    for seen in (8, 16, 24):
        for name in ("samples/grid", "samples/prompts"):
            shutil.copy(runs[0].picture(name, 0), runs[0].picture(name, seen))
    for run in runs[1:]:
        shutil.copytree(runs[0].media, run.media)
    page = write_comparison(runs, tmp_path / "comparison.html")
    media = {item["name"]: item for run in data_of(page)["runs"] for item in run["media"]}
    assert len(media["samples/grid"]["pictures"]) == 4 and page.stat().st_size < 600_000
    for run in data_of(page)["runs"]:
        grid, tall = run["media"]
        assert len(grid["pictures"]) == 4 and grid["left_out"] == 0
        assert 1 <= len(tall["pictures"]) < 4 and tall["left_out"] == 4 - len(tall["pictures"])
        assert tall["pictures"][-1]["images_seen"] == 24 and tall["pictures"][-1]["width"] in (90, 120)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 100])
def test_every_picture_has_its_turn(count):
    assert sorted(report._coarse_to_fine(count)) == list(range(count))


USE = """<script>
{  // a block, for names of its own
const found = {}, $ = (query) => document.querySelector(query), all = (query) => [...document.querySelectorAll(query)];
const set = (node, value, kind) => { node.value = value; node.dispatchEvent(new Event(kind)); };
const chart = (title) => all(".chart").find((node) => node.querySelector("b").textContent.startsWith(title));
const viewer = $(".slide").closest(".viewer"), slider = viewer.querySelector("input");
const newest = viewer.querySelector("img").src;
set(slider, 0, "input");
found.slider = [viewer.querySelector("img").src !== newest, viewer.querySelector(".soft").textContent];
const many = chart(all(".legend").length ? all(".legend")[0].parentNode.querySelector("b").textContent : "");
const paths = () => many.querySelectorAll("svg path").length, before = paths();
many.querySelector(".legend button").click();
found.legend = before - paths();
const loss = chart("B5"), line = () => loss.querySelector("svg path:last-of-type").getAttribute("d"), whole = line();
set($("#smoothing"), 0.9, "input");
found.smoothing = line() !== whole;
set($("#smoothing"), 0, "input");
$("#log").click();
found.log = line() !== whole;
$("#log").click();
const svg = loss.querySelector("svg"), box = svg.getBoundingClientRect();
const pointer = (kind, part) => svg.dispatchEvent(
  new PointerEvent(kind, { pointerType: "mouse", pointerId: 1, clientX: box.left + part * box.width }));
pointer("pointerdown", 0.1); pointer("pointercancel", 0.1); pointer("pointerup", 0.9);
found.cancelled = line() === whole;
pointer("pointerdown", 0.3); pointer("pointermove", 0.5); pointer("pointerup", 0.6);
found.zoom = line().length < whole.length && !loss.querySelector("button").hidden;
loss.querySelector("button").click();
found.whole = line() === whole;
viewer.querySelector("button").click();
found.enlarged = $("dialog[open] img").src === viewer.querySelector("img").src;
$("dialog").close();
found.ticks = told([0.0417, 0.04171, 0.04172]).join() === "0.0417,0.04171,0.04172" && told([0, 5000]).join() === "0,5k";
set($("#axis"), "gpu_hours", "change");
found.axis = loss.querySelector(".value").textContent;
$("#axis").value = "images"; $("#axis").dispatchEvent(new Event("change"));
$("#data").textContent = "";
document.title = JSON.stringify(found);
}
</script>"""


def used(page: Path, folder: Path) -> dict[str, object]:
    """What the page's controls do, tried by a script in the page itself; fails on anything in the console."""
    copy = folder / "used.html"
    copy.write_text(page.read_text().replace("</body>", USE + "</body>"))
    done = chromium(copy, folder, "--window-size=1280,2400", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title
    return json.loads(html.unescape(title[1]))


@pytest.mark.slow
@needs_chromium
def test_every_control_works(run_dir, several, tmp_path):
    one = used(write_report(run_dir), tmp_path)
    assert one.pop("slider") == [True, "38,400 images"] and "GPU hours" in str(one.pop("axis"))
    assert one.pop("legend") == 1 and set(one.values()) == {True}
    both = used(write_comparison(several, tmp_path / "comparison.html"), tmp_path)
    assert both.pop("slider") == [True, "38,400 images"] and "GPU hours" in str(both.pop("axis"))
    assert both.pop("legend") == 1 and set(both.values()) == {True}


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_draws_the_page_without_errors(run_dir, tmp_path, scheme):
    page, shot = write_report(run_dir), tmp_path / "report.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    width = 500 if scheme == "dark" else 1280
    done = chromium(page, tmp_path, *dark, f"--window-size={width},2400", f"--screenshot={shot}")
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(shot) as image:
        assert image.width == width and len(image.convert("RGB").getcolors(1 << 24) or []) > 100
        assert (np.asarray(image.convert("L"))[5, 5] > 128) == (scheme == "light")


@pytest.mark.slow
@needs_chromium
def test_browser_builds_every_section(run_dir, tmp_path):
    done = chromium(write_report(run_dir), tmp_path, "--dump-dom")
    body = done.stdout.split('<script id="data"')[0]
    for section in ("B", "C", "D", "E", "events", "launches", "config", "files"):
        assert re.search(rf'<section id="{section}"[^>]*><h2>', body), section
    numbers = [panel for panel in data_of(run_dir.report)["panels"] if not panel["names"][0].startswith("samples/")]
    assert body.count('<div class="chart">') == len(numbers) + 1  # and the map of timesteps
    assert 'class="mark resume"' in body and "12.5" in body and "guidance 3" in body and "0.96875" in body
    assert body.count('class="across"') == 2, "scores stand under their conditions, each told once; others under none"
    assert "<b>&quot;quoted" not in body and "&lt;/script&gt;&lt;b&gt;" in body
