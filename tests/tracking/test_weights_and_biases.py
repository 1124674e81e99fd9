"""Real offline W&B runs, in processes of their own, read back from their .wandb files with `wandb leet inspect`."""

import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from offline_wandb import WANDB, inspect, parts, points, rows, train
from PIL import Image

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.weights_and_biases import _reachable, closing_hint, run_id

FLUSH_S = 16.0  # wandb writes an offline run to disk every 15 s


def test_offline_run_can_be_read_back(tmp_path, environment):
    run = tmp_path / "debug" / "first"
    assert closing_hint(RunDir(run)) == ""
    launch = {"order_id": "5f3c", "code": {"commit": "c0ffee", "dirty": False}, "engine": {"world": 8}}
    storage.write_json(RunDir(run).repro, {"launches": [{}, {**launch, "config": {"seed": 7}, "packages": {"x": "1"}}]})
    train(run, 0, 40, "finished", environment)
    (part,) = parts(run)
    summary = json.loads(inspect(part, "--summary", "--json"))
    assert summary["state"] == "finished" and summary["exit_code"] == 0
    assert summary["run_id"] == run_id(RunDir(run)) and summary["project"] == "trial"
    assert summary["config"]["unet"] == {"channels": 64} and summary["config"]["seed"] == 7
    assert summary["config"]["launch"] == launch and summary["console_lines"] == 0
    logged = {name for name in summary["summary"] if not name.startswith("_")}
    assert logged == {
        "train/loss", "train/lr", "train/images_seen", "eval/fd_random", "samples/grid", "events/checkpoint",
        "samples/table",
    }  # fmt: skip
    assert summary["summary"]["samples/grid"]["caption"] == "after 40"
    records = [json.loads(line) for line in inspect(part, "--json").splitlines()]
    metrics = [record["metric"] for record in records if "name" in record.get("metric", {})]
    axes = {metric["name"]: metric["step_metric"] for metric in metrics if metric["name"] != "train/images_seen"}
    assert axes == dict.fromkeys(logged - {"train/images_seen"}, "train/images_seen")
    assert {metric["name"]: metric.get("summary") for metric in metrics}["eval/fd_random"] == {
        "min": True,
        "last": True,
    }
    hint = closing_hint(RunDir(run))
    assert f"wandb leet {run / 'wandb'}" in hint and f"wandb sync {part}" in hint
    command = next(line.split(":", 1)[1] for line in hint.splitlines() if "inspect" in line).split()
    assert command[0] == "wandb"
    done = subprocess.run([WANDB, *command[1:]], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "train/loss" in done.stdout


@pytest.mark.parametrize("how", ["references", "files"])
def test_artifacts_and_the_table_of_samples_can_be_read_back(tmp_path, environment, how):
    run = tmp_path / "debug" / "first"
    held = {
        "weights/model.safetensors": b"w" * 1000, "weights/config.json": b"{}", "repro.json": b'{"launches": []}',
        "config.json": b'{"seed": 7}', "manifests/latents.json": b'{"n": 3}',
    }  # fmt: skip
    for name, content in held.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    said = train(run, 0, 40, "finished", environment | {"ARTIFACTS": how})
    does = "refers to" if how == "references" else "uploads"
    assert f"W&B artifact weights-{run_id(RunDir(run))}: {does} 2 files, 0.0 MB" in said
    (part,) = parts(run)
    logged = [json.loads(line) for line in inspect(part, "--json").splitlines()]
    found = {record["artifact"]["type"]: record["artifact"] for record in logged if record["type"] == "artifact"}
    assert found.keys() == {"weights", "manifests", "run_table"}
    assert set(found["weights"]["aliases"]) == {"latest", "images_40"}
    assert found["weights"]["name"] == f"weights-{run_id(RunDir(run))}"
    files = {one["path"]: one for one in found["weights"]["manifest"]["contents"]}
    assert files.keys() == {"model.safetensors", "config.json"}
    weights = files["model.safetensors"]
    where = weights["ref"].removeprefix("file://") if how == "references" else weights["local_path"]
    assert where == str(run / "weights" / "model.safetensors") and weights["size"] == "1000"
    assert weights["digest"] == base64.b64encode(hashlib.md5(b"w" * 1000).digest()).decode()
    files = {one["path"]: one for one in found["manifests"]["manifest"]["contents"]}
    assert files.keys() == {"repro.json", "config.json", "latents.json"}
    shown = {one["path"]: one["local_path"] for one in found["run_table"]["manifest"]["contents"]}
    copied = [Path(path) for path in (*(one["local_path"] for one in files.values()), *shown.values())]
    assert all(run in path.parents and path.exists() for path in copied), "nothing lies in the user's home"
    content = json.loads(Path(shown["samples/table.table.json"]).read_text())
    assert content["columns"] == ["grid", "prompt", "guidance", "weights", "picture"]
    assert [row[:4] for row in content["data"]] == [["samples/grid", side, 3, "ema/32"] for side in ("left", "right")]
    right = np.asarray(Image.open(shown[content["data"][1][4]["path"]]))
    assert right.shape == (6, 4, 3) and (right == 140).all()


ALERTS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.alerts import alert_of
from ldm_scale.tracking.weights_and_biases import Place, send_alert

run_dir = RunDir(Path(sys.argv[1]))
run = Place(project="trial").open(run_dir, "offline", {}, folder=run_dir.path)
send_alert(run, run_dir, alert_of("preempted", {}))
online = SimpleNamespace(offline=False, alert=run.alert)
diverged = {"start": 640, "why": "the loss is nan", "action": "rollback", "samples": []}
for kind, fields in {"trouble": diverged, "failed": {"reason": "Diverged"}, "stopped": {"reason": "by hand"}}.items():
    send_alert(online, run_dir, alert_of(kind, fields))
run.finish()
"""


def test_wandb_takes_alerts_of_divergence_and_of_the_end_and_none_offline(tmp_path, environment):
    """There is no network here: what a real run is told, once as if it were online."""
    run = tmp_path / "debug" / "first"
    run.mkdir(parents=True)
    subprocess.run([sys.executable, "-c", ALERTS, str(run)], env=environment, check=True, timeout=120)
    (part,) = parts(run)
    records = [json.loads(line) for line in inspect(part, "--json").splitlines()]
    alerts = [record["alert"] for record in records if record["type"] == "alert"]
    assert [(alert["level"], alert["title"]) for alert in alerts] == [
        ("WARN", "trouble: debug/first"), ("ERROR", "failed: debug/first"), ("INFO", "stopped: debug/first"),
    ]  # fmt: skip
    assert "after 640 images the loss is nan" in alerts[0]["text"] and alerts[1]["text"] == "Diverged"


@pytest.mark.parametrize(
    "end, wait",
    [
        ("failed", ()),
        pytest.param("preempted", (), marks=pytest.mark.slow),
        pytest.param("kill", (str(FLUSH_S),), marks=pytest.mark.slow),
    ],
)
def test_resumed_run_gives_no_point_twice(tmp_path, environment, end, wait):
    run = tmp_path / "run"
    train(run, 0, 80, end, environment, *wait)
    assert max(row["train/images_seen"] for row in rows(run)) == 80
    time.sleep(1.1)  # wandb names a folder by the second
    train(run, 50, 120, "finished", environment)
    assert len(parts(run)) == 2
    held = rows(run)
    expected = {(name, seen) for seen in range(10, 121, 10) for name in ("train/loss", "train/lr", "train/images_seen")}
    expected |= {(name, seen) for seen in range(20, 121, 20) for name in ("eval/fd_random", "samples/grid")}
    expected.add(("samples/table", 120))
    counts = points(held)
    assert {point for point in counts if not point[0].startswith("events/")} == expected
    assert {point: n for point, n in counts.items() if n > 1 and point[0] != "train/images_seen"} == {}
    numbers = [row["_step"] for row in held]
    assert numbers == sorted(set(numbers)), "both folders number their rows in one sequence"
    best = json.loads(inspect(parts(run)[-1], "--summary", "--json"))["summary"]["eval/fd_random"]
    assert best == {"min": 1, "last": 81}, "the best is the first process's, and W&B keeps it per process"


@pytest.mark.slow
def test_view_is_filled_up_from_metrics(tmp_path, environment):
    """A run begun without W&B shows its whole history once W&B is there."""
    run = tmp_path / "run"
    train(run, 0, 60, "finished", {**environment, "WANDB_MODE": "disabled"})
    assert not (run / "wandb").exists()
    train(run, 60, 80, "finished", environment)
    losses = [row["train/images_seen"] for row in rows(run) if "train/loss" in row]
    assert losses == list(range(10, 81, 10))


@pytest.mark.slow
def test_scores_made_beside_are_sent_in_any_order_and_after_the_end(tmp_path, environment):
    run_dir = RunDir(tmp_path / "debug" / "first")
    beside = [(40, 3.0), (20, 5.0), (60, 2.0)]  # W&B has 40 images when it hears of 20

    def watched(*scores):
        run_dir.watched.parent.mkdir(parents=True, exist_ok=True)
        with open(run_dir.watched, "a") as file:
            for seen, value in scores:
                file.write(json.dumps({"time": 0.0, "images_seen": seen, "scores": {"eval/fd_clip": value}}) + "\n")

    watched(*beside[:2])
    train(run_dir.path, 0, 60, "finished", environment)
    watched(beside[2])
    late = "import sys; from pathlib import Path; from ldm_scale.core.run_dir import RunDir\n"
    late += "from ldm_scale.tracking.tracker import TrackerConfig\n"
    late += "TrackerConfig(project='trial').view(RunDir(Path(sys.argv[1]))).catch_up({}, 'finished')"
    for _ in range(2):  # and then there is nothing left
        subprocess.run([sys.executable, "-c", late, str(run_dir.path)], env=environment, check=True, timeout=60)
    assert len(parts(run_dir.path)) == 2 and len({part.name.split("-")[-1] for part in parts(run_dir.path)}) == 1
    found = rows(run_dir.path)
    assert [(row["train/images_seen"], row["eval/fd_clip"]) for row in found if "eval/fd_clip" in row] == beside
    assert [row["train/images_seen"] for row in found if "train/loss" in row] == list(range(10, 61, 10))
    assert len({row["_step"] for row in found}) == len(found)
    summary = json.loads(inspect(parts(run_dir.path)[-1], "--summary", "--json"))["summary"]
    assert summary["eval/fd_clip"] == {"min": 2.0, "last": 2.0}


@pytest.fixture
def deaf_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in held:
            connection.close()


def seconds_to_start(output: str) -> float:
    found = re.search(r"start took ([\d.]+)", output)
    assert found, output
    return float(found[1])


@pytest.mark.slow
def test_key_without_network_becomes_offline(tmp_path, environment):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        output = train(
            tmp_path / "run", 0, 40, "finished", {**environment, "WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": url}
        )
    assert "is unreachable; this run is recorded offline" in output
    assert seconds_to_start(output) < 15
    assert len(rows(tmp_path / "run")) == 10


@pytest.mark.slow
def test_server_that_never_answers_becomes_offline(tmp_path, environment, deaf_server):
    environment |= {"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": deaf_server}
    output = train(tmp_path / "run", 0, 40, "finished", environment)
    assert "W&B did not answer" in output
    assert seconds_to_start(output) < 15
    assert len(rows(tmp_path / "run")) == 10


def test_address_that_swallows_packets_is_given_up(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *args, **named: threading.Event().wait())
    began = time.perf_counter()
    assert not _reachable("https://api.example.org", 0.2)
    assert time.perf_counter() - began < 2


def test_proxy_is_asked_instead_of_the_host(monkeypatch, deaf_server):
    monkeypatch.setenv("https_proxy", deaf_server)
    assert _reachable("https://no-such-host.invalid", 2.0)


@pytest.mark.slow
def test_failing_wandb_does_not_end_training(tmp_path, environment):
    (tmp_path / "wandb").write_text("a file where W&B wants a folder")
    output = train(tmp_path, 0, 40, "finished", environment)
    assert "W&B stopped" in output
    assert len(RunDir(tmp_path).read_lines(RunDir(tmp_path).metrics)) == 6
