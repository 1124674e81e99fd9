"""The burn-in, as a person starts it: two processes killed and resumed, two hosts of which one is slow for real."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Toy

from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import burn_in, burn_in_rates, config, plan
from ldm_scale.jobs.burn_in_page import is_passed, page
from ldm_scale.jobs.burn_in_rates import Notes, ring
from ldm_scale.jobs.burn_in_training import differing
from ldm_scale.jobs.burn_in_verdict import exclude, judge
from ldm_scale.jobs.preflight import Check

COMMAND = Path(__file__).parents[2] / "launchers" / "burn_in"
CPU = {"device": "CPU", "kind": "cpu", "products_bf16": 1e10, "at": "end"}
NAMESPACE = subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0


def training(toy: Toy, *more: str) -> list[str]:
    """Overrides of a training that is over in seconds."""
    return toy.overrides("engine=ddp", "engine.precision=fp32", "micro_batch=4", "ema_half_lives=[32]", *more)


def test_a_host_fails_by_its_share_of_the_median_or_by_its_own_limit() -> None:
    notes: list[dict[str, Any]] = [{**CPU, "read": rate} for rate in (10.0, 11.0, 5.0, 12.0)]
    assert [host.failing for host in judge("abcd", notes)] == [set(), set(), {"read"}, set()]
    notes[2]["read"], notes[3]["products_bf16"] = 6.0, 0.8e10
    found = judge("abcd", notes)
    assert [host.failing for host in found] == [set(), set(), set(), {"products_bf16"}]
    assert exclude(found) == "d  # bfloat16 products 8 GFLOP/s, 0.80 of the median (at least 0.85)\n"
    (dead,) = judge("a", [{**CPU, "read": 0.1}])
    assert dead.reasons == ["samples read 0.1 /s, under the limit of 1 /s"]


def test_a_host_counts_by_its_slowest_process_and_reads_with_all() -> None:
    notes = [{**CPU, "products_bf16": rate, "read": 4.0} for rate in (1e10, 2e10, 3e10, 4e10)]
    first, second = judge("aabb", notes)
    assert (first.rates["products_bf16"], second.rates["products_bf16"]) == (1e10, 3e10)
    assert first.rates["read"] == 8.0


def test_what_hangs_alone_is_the_host_s_fault_and_what_hangs_together_nobody_s() -> None:
    notes = [{**CPU, "at": "end"}, {**CPU, "at": "memory"}, {**CPU, "at": "all-reduce with a"}, {}]
    found = judge("abcd", notes)
    assert [host.reasons for host in found if host.name in "ac"] == [[], []]
    assert found[1].reasons == ["process 0 ended or hung at memory"]
    assert found[3].reasons == ["process 0 ended or hung at start"]


def test_a_slow_link_is_told_from_its_neighbours() -> None:
    hosts = [f"node{i}" for i in range(5)]
    turns = ring(hosts)
    assert sorted(pair for turn in turns for pair in turn) == sorted(zip(hosts, [*hosts[1:], hosts[0]], strict=True))
    assert all(len({host for pair in turn for host in pair}) == 2 * len(turn) for turn in turns)
    assert ring(["a"]) == [] and ring(["a", "b"]) == [[("a", "b")]]
    notes = [dict(CPU) for _ in hosts]
    for number, turn in enumerate(turns):
        for pair in turn:
            for host in pair:
                notes[hosts.index(host)][f"neighbour_{number}"] = 1e8 if "node3" in pair else 1e9
    assert [host.name for host in judge(hosts, notes) if host.failing == {"between"}] == ["node3"]


def test_a_gpu_with_errors_or_slow_clocks_fails_its_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no GPU here: a program of that name prints what nvidia-smi would, of a driver before 535."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        "#!/bin/sh\ncase $1 in *clocks_event*) echo Field is not a valid field to query.; exit 2;; esac\n"
        "echo '0, H100, 0, 1980, 1980, 40, Not Active, Not Active, Not Active'\n"
        "echo '1, H100, 2, 1980, 1980, 41, Not Active, Not Active, Not Active'\n"
        "echo '2, H100, [N/A], 1200, 1980, 90, Active, Active, Not Active'\n"
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    asked = burn_in_rates._begin_smi("clocks_event_reasons")
    assert asked is not None
    (host,) = judge("a", [{**CPU, "gpus": burn_in_rates._gpus(asked)}])
    assert host.reasons == [
        "GPU 1: 2 uncorrected ECC errors",
        "GPU 2: hw_slowdown, hw_thermal_slowdown at 1200 of 1980 MHz, 90 C",
    ]


def test_notes_are_read_back_though_the_last_was_cut_short(tmp_path: Path) -> None:
    notes = Notes(tmp_path, 3)
    notes.write(at="read")
    notes.write(read=2.0)
    (tmp_path / "3.jsonl").open("a").write('{"at": "wri')
    assert notes.read() == {"at": "read", "read": 2.0} and Notes(tmp_path, 4).read() == {}


def test_the_page_escapes_what_it_shows() -> None:
    hosts = judge("ab", [{**CPU, "wrong": "<b>"}, CPU])
    html = page("training", {"took": "1 min"}, hosts, [Check("replay", "fails", "a & b")], ["next"])
    assert "&lt;b&gt;" in html and "a &amp; b" in html and "<b>" not in html
    assert not is_passed(hosts, []) and not is_passed(hosts[1:], [Check("x", "fails", "")]) and is_passed(hosts[1:], [])


def rates(file: Path) -> Path:
    machine = {"name": "H100", "matmul": 123e12, "bus": 45e9}
    file.write_text(json.dumps({"measured": "on 2 hosts", "machine": machine, "hosts": {}}))
    return file


@pytest.mark.slow
def test_the_plan_takes_measured_rates_and_says_so(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*training(toy), "--gpus", "2", "--rates", str(rates(tmp_path / "rates.json")), "--bus-gbs", "7"]
    plan.main([*asked, "--json"])
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert (machine["matmul"], machine["bus"], machine["memory"]) == (123e12, 7e9, 80_000_000_000)
    assert "bus by hand; others measured by launchers/burn_in, on 2 hosts" in machine["source"]
    assert "memory, memory_bandwidth, peak assumed, of H100" in machine["source"]
    (tmp_path / "rates.json").write_text("{}")
    with pytest.raises(SystemExit):
        plan.main(asked)
    assert "is not what launchers/burn_in writes" in capsys.readouterr().err


@pytest.mark.slow
def test_another_run_differs(toy: Toy, tmp_path: Path) -> None:
    one, other = RunDir(tmp_path / "one"), RunDir(tmp_path / "other")
    toy.train(one.path, "total_images=32", "every.save=16", world=1).finish()
    shutil.copytree(one.path, other.path)
    assert differing(one, other, 32) == {"losses": 0.0, "weights": 0.0, "averages": 0.0}
    lines = [json.loads(line) for line in other.metrics.read_text().splitlines()]
    next(line for line in lines if "train/loss" in line)["train/loss"] *= 1.01
    other.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert differing(one, other, 32)["losses"] == pytest.approx(0.01, rel=0.02)
    shutil.rmtree(sorted(other.checkpoints.iterdir())[-1])
    assert differing(one, other, 32)["weights"] > 0
    other.metrics.write_text("")
    assert max(differing(one, other, 32).values()) == float("inf")


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": path, **changes}


@pytest.mark.slow
def test_two_processes_are_measured_killed_resumed_stopped_and_replayed(toy: Toy, tmp_path: Path) -> None:
    overrides = training(toy, "guard.straggler=1")  # this machine is shared with other tests
    out = tmp_path / "burn_in"
    command = [str(COMMAND), *overrides, "--processes", "2", "--steps", "48", "--seconds", "0.2", "--out", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "burn-in passed: 1 of 1 hosts pass" in done.stdout and f"--rates {out / 'rates.json'}" in done.stdout
    for said in ("kill -9 of one process: rank 1", "resumed on 1, SIGTERM: went on", "the same bit for bit"):
        assert said in done.stdout
    found = json.loads((out / "rates.json").read_text())
    (host,) = found["hosts"].values()
    assert host.keys() >= {"products_bf16", "products_fp32", "reduce_within", "gather_within", "read", "write"}
    assert found["machine"]["matmul"] > 0 and found["machine"]["bus"] > 0
    assert (out / "exclude.txt").read_text() == ""
    html = (out / "burn_in.html").read_text()
    assert "passed" in html and "failed" not in html.split("</style>")[1] and "http" not in html
    assert [event["event"] for event in RunDir(out / "work" / "disturbed").read_lines(
        RunDir(out / "work" / "disturbed").events
    ) if event["event"] in ("start", "resume", "preempted", "finished")] == [
        "start", "resume", "preempted", "resume", "finished",
    ]  # fmt: skip


def on_and_off(group: int, over: threading.Event) -> None:
    """Let a host run for a tenth of the time."""
    while not over.wait(0.01):
        os.killpg(group, signal.SIGSTOP)
        over.wait(0.09)
        os.killpg(group, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.skipif(not NAMESPACE, reason="this machine gives nobody a host name of one's own (unshare --uts)")
def test_of_two_hosts_the_slow_one_is_found(toy: Toy, tmp_path: Path) -> None:
    """Each has its own host name; one is stopped nine tenths of the time while it is measured."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    out, hosts = tmp_path / "burn_in", []
    for rank, name in enumerate(("quick", "slow")):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [str(COMMAND), *training(toy), "--steps", "0", "--seconds", "0.5", "--out", str(out)]
        hosts.append(
            subprocess.Popen(
                ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh", *command],
                env=environment(**place),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    over = threading.Event()
    slowing = threading.Thread(target=on_and_off, args=(hosts[1].pid, over))
    until = time.monotonic() + 200
    while not list((out / "work" / "rates").glob("*.jsonl")):
        assert hosts[0].poll() is None and time.monotonic() < until, hosts[0].communicate()[0]
        time.sleep(0.05)
    slowing.start()
    try:
        said, _ = hosts[0].communicate(timeout=300)
    finally:
        over.set()
        slowing.join()
    hosts[1].communicate(timeout=60)
    assert [host.returncode for host in hosts] == [1, 1], said
    assert "burn-in FAILED: 1 of 2 hosts pass" in said
    (line,) = (out / "exclude.txt").read_text().splitlines()
    name, _, reasons = line.partition("  # ")
    assert name == "slow" and "bfloat16 products" in reasons and "of the median (at least 0.85)" in reasons


@pytest.mark.slow
def test_what_would_stop_the_training_is_said_before_anything_is_measured(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    def unmet(*more: str) -> str:
        return burn_in._unmet(config.compose("train", training(toy, *more)), 2)

    assert unmet() == ""
    assert "one_process on 2 GPUs" in unmet("engine=one_process")
    assert "nowhere" in unmet("data.latents=nowhere")
    with pytest.raises(SystemExit) as left:
        burn_in.main([*training(toy), "unet.modle_channels=3"])
    assert left.value.code == 2 and "did you mean model_channels" in capsys.readouterr().err
