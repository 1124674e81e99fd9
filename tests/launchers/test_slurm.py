"""A real Slurm of three nodes: a job told to stop, out of time, or robbed of a node is the same run all along."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Toy, curve, differing, events
from slurm_cluster import Cluster, finished_pieces, missing

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import repro
from ldm_scale.training.checkpoint_files import complete_ones

ROOT = Path(__file__).parents[2]
WHERE = ("NODES=2", "GPUS_PER_NODE=0", "TIME=30")
HOW = ("total_images=800", "every.save=40")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() != [], reason=f"not installed: {', '.join(missing())} (make system-packages)"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def images(run: Path) -> int:
    """How far the newest checkpoint is."""
    newest = complete_ones(RunDir(run).checkpoints)[:1]
    return int(newest[0].name.removeprefix("images_")) if newest else 0


def files(folder: Path) -> dict[str, bytes]:
    """What lies in a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def hosts(log: Path) -> list[str]:
    """The hosts of each attempt, as the job's log has them."""
    return re.findall(r": start \d+ on (\S+):", log.read_text())


def test_a_training_outlives_a_signal_its_time_limit_and_a_lost_host(
    cluster: Cluster, toy: Toy, tmp_path: Path
) -> None:
    undisturbed, run, bad = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "bad.txt"
    toy.train(undisturbed, *HOW, engine="zero1").finish()
    command = ("train", *toy.training(run, *HOW, "tracker.wandb=true", engine="zero1"), *WHERE)
    job = cluster.submit(*command, cwd=tmp_path, LDM_EXCLUDE=str(bad))
    log = run / f"slurm_{job}.log"

    cluster.wait(lambda: images(run) > 0, log)
    bad.write_text("n1  # slow\n")
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.requeued(job, 1, log)

    cluster.wait(lambda: len(events(run, "start", "resume")) == 2, log)
    frozen = cluster.training(run)  # the limit takes effect within half a minute, and the training would be over
    for process in frozen:
        process.suspend()
    cluster.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={cluster.minutes(job) + 2}")
    cluster.wait(lambda: "told to stop" in log.read_text(), log)
    for process in frozen:
        process.resume()
    cluster.requeued(job, 2, log)
    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=30")

    before = images(run)
    cluster.wait(lambda: images(run) > before, log)
    bad.write_text("n3\n")
    cluster.kill_node("n3")
    cluster.requeued(job, 3, log)

    cluster.wait(lambda: cluster.state(job) == "COMPLETED", log)
    assert hosts(log) == ["n[1-2]", "n[2-3]", "n[2-3]", "n[1-2]"]
    assert differing(run, undisturbed) == []
    assert curve(run) == curve(undisturbed)
    told = [event["event"] for event in events(run, "start", "resume", "preempted", "finished")]
    assert told == ["start", "preempted", "resume", "preempted", "resume", "resume", "finished"]
    assert storage.read_json(RunDir(run).status)["state"] == "finished"
    assert len({folder.name.rpartition("-")[2] for folder in RunDir(run).wandb.glob("offline-run-*")}) == 1
    (snapshot,) = (run / "snapshot").iterdir()
    assert {launch["code"]["snapshot"] for launch in repro.launches(RunDir(run))} == {str(snapshot / "code")}
    ours, recorded = storage.read_json(snapshot / "config.json"), storage.read_json(RunDir(run).config)
    assert ours == recorded


def test_a_job_that_gets_nowhere_is_held(cluster: Cluster, toy: Toy, tmp_path: Path) -> None:
    """As one whose TIME is shorter than start-up and GRACE: it is told to stop before it has done anything."""
    run, told = tmp_path / "run", tmp_path / "told.jsonl"
    how = toy.training(run, f"tracker.alert_command='cat >> {told}'", engine="one_process")
    job = cluster.submit("train", *how, "NODES=1", "GPUS_PER_NODE=0", "TIME=30", cwd=tmp_path)
    log = run / f"slurm_{job}.log"

    for attempt in (1, 2, 3):
        cluster.wait(lambda: cluster.training(run) != [], log)
        cluster.ask("scancel", "--signal=USR1", job)
        if attempt < 3:
            cluster.requeued(job, attempt, log)
    cluster.wait(lambda: cluster.state(job) == "FAILED", log)
    status = storage.read_json(RunDir(run).status)
    assert status["state"] == "failed" and status["reason"].startswith("held: 3 attempts in a row left nothing new in")
    (alert,) = RunDir(run).read_lines(RunDir(run).alerts)
    assert alert["text"] == status["reason"] and RunDir(run).read_lines(told) == [alert]
    assert [event["reason"] for event in events(run, "failed")] == [status["reason"]]
    (script,) = (run / "snapshot").glob("*/job.sh")
    assert "cat >> " in script.read_text() and script.stat().st_mode & 0o077 == 0
    assert "cat >> " not in log.read_text()  # the address of a web hook, for one


def test_once_it_has_saved_a_job_goes_back_whatever_it_still_waits_for(
    cluster: Cluster, toy: Toy, tmp_path: Path
) -> None:
    """As one whose W&B does not answer when time is over. And where nothing new was left three times, it is held."""
    run = tmp_path / "run"
    how = toy.training(run, *HOW, "tracker.alert_command='grep -q preempted && sleep 60'", engine="one_process")
    job = cluster.submit("train", *how, "NODES=1", "GPUS_PER_NODE=0", "GRACE=20", cwd=tmp_path)
    log = run / f"slurm_{job}.log"
    cluster.wait(lambda: images(run) > 0, log)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    cluster.wait(lambda: "preempted: requeued" in log.read_text(), log)
    (script,) = (run / "snapshot").glob("*/job.sh")
    begun = script.parent / f"begun_{job}"
    assert f"job {job}: ended with" not in log.read_text() and len(begun.read_text().splitlines()) == 1

    begun.write_text(3 * finished_pieces(script.read_text()))
    cluster.requeued(job, 1, log)
    cluster.wait(lambda: cluster.state(job) == "FAILED", log)
    assert "left nothing new" in log.read_text() and "Slurm itself began it again" in log.read_text()
    assert hosts(log) == ["n1"] and storage.read_json(RunDir(run).status)["cause"] == "error"


def test_encoding_drawing_and_scoring(cluster: Cluster, toy: Toy, tmp_path: Path) -> None:
    cache, run, pictures = tmp_path / "cache", tmp_path / "run", tmp_path / "pictures"
    how = toy.overrides("precompute.min_psnr=0", f"data.latents={cache}", f"run_dir={tmp_path}/encoding")
    encoding = cluster.submit("precompute", *how, "NODES=2", "GPUS_PER_NODE=0", cwd=tmp_path)
    toy.train(run, engine="one_process", world=1).finish()
    cluster.wait(lambda: cluster.state(encoding) == "COMPLETED", tmp_path / f"encoding/slurm_{encoding}.log")
    assert files(cache) == files(toy.path / "latents")

    what = (f"run_dir={run}", "sampler.steps=2", "GPUS_PER_NODE=0")
    drawn = ("prompts=[a, b, c]", "batch=1", f"out={pictures}", "NODES=2")
    drawing = cluster.submit("sample", *what, *drawn, cwd=tmp_path)
    scoring = cluster.submit("evaluate", *what, "evaluation.images=8", "evaluation.batch=8", "NODES=1", cwd=tmp_path)
    cluster.wait(lambda: cluster.state(drawing) == "COMPLETED", run / f"slurm_{drawing}.log")
    cluster.wait(lambda: cluster.state(scoring) == "COMPLETED", run / f"slurm_{scoring}.log")
    assert len(list(pictures.glob("0*.png"))) == 3
    (scores,) = (run / "evaluation").glob("*.json")
    assert storage.read_json(scores)["scores"]["eval/fd_random"] > 0


@pytest.mark.faults
def test_the_host_of_the_script_itself_is_lost(cluster: Cluster, toy: Toy, tmp_path: Path) -> None:
    """Nobody is left to decide: Slurm itself requeues."""
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    toy.train(undisturbed, *HOW).finish()
    job = cluster.submit("train", *toy.training(run, *HOW), *WHERE, cwd=tmp_path)
    log = run / f"slurm_{job}.log"
    cluster.wait(lambda: images(run) > 0, log)
    first = hosts(log)[0][2]
    cluster.kill_node(f"n{first}")
    cluster.requeued(job, 1, log)
    cluster.wait(lambda: cluster.state(job) == "COMPLETED", log)
    assert differing(run, undisturbed) == []


@pytest.mark.faults
def test_a_process_is_lost_while_the_controller_is_away(cluster: Cluster, toy: Toy, tmp_path: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    toy.train(undisturbed, *HOW).finish()
    job = cluster.submit("train", *toy.training(run, *HOW), *WHERE, cwd=tmp_path)
    log = run / f"slurm_{job}.log"
    cluster.wait(lambda: images(run) > 0, log)
    with cluster.controller_away():
        cluster.training(run)[0].kill()
        cluster.wait(lambda: "a process is lost, but Slurm does not answer" in log.read_text(), log)
    cluster.requeued(job, 1, log)
    cluster.wait(lambda: cluster.state(job) == "COMPLETED", log)
    assert differing(run, undisturbed) == []


@pytest.mark.faults
def test_another_job_takes_the_hosts_and_gives_them_back(cluster: Cluster, toy: Toy, tmp_path: Path) -> None:
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    longer = ("total_images=8000", "every.save=400")  # Slurm takes its time
    toy.train(undisturbed, *longer).finish()
    job = cluster.submit("train", *toy.training(run, *longer), *WHERE, cwd=tmp_path)
    log = run / f"slurm_{job}.log"
    cluster.wait(lambda: images(run) > 0, log)
    cluster.ask("sbatch", "--partition=urgent", "--nodes=3", "--output=/dev/null", "--wrap=true")
    cluster.requeued(job, 1, log)
    cluster.wait(lambda: cluster.state(job) == "COMPLETED", log)
    told = [event["event"] for event in events(run, "start", "resume", "preempted", "finished")]
    assert told == ["start", "preempted", "resume", "finished"]
    assert differing(run, undisturbed) == []


@pytest.mark.faults
def test_encoding_is_told_to_stop_and_goes_on(cluster: Cluster, toy: Toy, tmp_path: Path) -> None:
    world, cache = tmp_path / "world", tmp_path / "cache"
    write_world(world, Recipe(train=2400, val=8, objects=1, size=32, shard_size=100, seed=1))
    how = ("precompute.min_psnr=0", "precompute.batch=8", f"data.images={world}/train", f"data.latents={cache}")
    encoding = toy.overrides(*how, f"run_dir={tmp_path}/run")
    job = cluster.submit("precompute", *encoding, *WHERE, cwd=tmp_path)
    log = tmp_path / f"run/slurm_{job}.log"
    cluster.wait(lambda: next(cache.rglob("*.done.json"), None) is not None, log)
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.requeued(job, 1, log)
    cluster.wait(lambda: cluster.state(job) == "COMPLETED", log)
    assert "ended with 75" in log.read_text() and "shards are done already" in log.read_text()
    assert len(list(cache.glob("*.tar"))) == 24 and (cache / "manifest.json").exists()


def test_a_sweep_is_two_runs_under_one_group(cluster: Cluster, toy: Toy, tmp_path: Path) -> None:
    run = tmp_path / "sweep"
    how = toy.training(run, "total_images=24", "seed=1,2", engine="one_process")
    job = cluster.submit("train", *how, "NODES=1", "GPUS_PER_NODE=0", cwd=tmp_path)
    both = [run / "seed-1", run / "seed-2"]
    cluster.wait(lambda: all(events(one, "finished") for one in both), run / f"slurm_{job}_0.log")
    assert {storage.read_json(RunDir(one).config)["tracker"]["group"] for one in both} == {"toy"}
    assert curve(both[0]) != curve(both[1])


def test_the_readmes_way_from_a_clone_to_a_job(cluster: Cluster, tmp_path: Path) -> None:
    """Its commands as they stand, but for two: the clone is of this checkout, the environment the one at hand."""
    section = (ROOT / "README.md").read_text().partition("## On a Slurm cluster")[2].partition("\n## ")[0]
    commands = [line.strip() for line in section.partition("`submit` takes")[0].splitlines() if line.startswith("    ")]
    assert len(commands) <= 6
    stand_in = {
        "git clone URL ldm_scale": f"git clone --quiet {shlex.quote(str(ROOT))} ldm_scale",
        "make setup": f"ln -s {shlex.quote(sys.prefix)} .venv",
    }
    assert stand_in.keys() <= set(commands)
    script = "\n".join(["set -e", *(stand_in.get(command, command) for command in commands[:-1])])
    done = cluster.type("bash", "-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "ldm_scale/runs/autoencoder_kl_f4/toy"
    job = done.stdout.partition("submitted  ")[2].partition(":")[0]
    log = run / f"slurm_{job}.log"
    cluster.wait(lambda: bool(curve(run)), log)
    status = cluster.type("bash", "-c", commands[-1], cwd=tmp_path / "ldm_scale")
    assert "runs/autoencoder_kl_f4/toy" in status.stdout and "running" in status.stdout, status.stderr
    assert [event["world"] for event in events(run, "start")] == [2]
    cluster.ask("scancel", job)
    cluster.wait(lambda: cluster.state(job) == "CANCELLED", log)
    assert "not requeued" in log.read_text()
