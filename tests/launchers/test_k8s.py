"""The Kubernetes manifests: against their published schemas, and their command run in two "pods" on this machine.

The schema of a JobSet is that of Kubeflow's API package, which carries it for its own use; of a Job, Kubernetes' own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from data_tools.make_toy_world import Recipe, write_world
from ldm_scale.core import runtime, storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config, preflight
from ldm_scale.training.checkpoint_files import complete_ones

ROOT = Path(__file__).parents[2]
K8S = ROOT / "launchers" / "k8s"
sys.path.insert(0, str(K8S))
pod_script = import_module("pod")
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")

Manifest = dict[str, Any]


def rendered(overlay: str) -> Manifest:
    """What `kubectl kustomize` makes of an overlay that has one base of one object, JSON patches and images."""
    folder = K8S / "overlays" / overlay
    told = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert told["resources"] == ["../../base"]
    manifest = yaml.safe_load((K8S / "base" / "jobset.yaml").read_text())
    for patch in told["patches"]:
        manifest = jsonpatch.apply_patch(manifest, yaml.safe_load(patch["patch"]))
    for image in told.get("images", []):
        assert container(manifest)["image"] == image["name"]
        container(manifest)["image"] = f"{image['newName']}:{image['newTag']}"
    return manifest


def job_of(manifest: Manifest) -> dict[str, Any]:
    (only,) = manifest["spec"]["replicatedJobs"]
    return only["template"]["spec"]


def container(manifest: Manifest) -> dict[str, Any]:
    (only,) = job_of(manifest)["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_reads_the_overlays_as_these_tests_do(overlay: str):
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("needs kubectl 1.21 or later, which Debian has not")
    told = subprocess.run([kubectl, "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, check=True)
    assert yaml.safe_load(told.stdout) == rendered(overlay)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_are_what_the_published_schemas_allow(overlay: str):
    manifest = rendered(overlay)
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest  # an unknown field would be lost on the way
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "host"}, "spec": job_of(manifest)}
    kubernetes_validate.validate(job, "1.30", strict=True)
    assert {rule["action"] for rule in manifest["spec"]["failurePolicy"]["rules"]} <= {*ACTIONS}
    assert job_of(manifest)["template"]["spec"]["restartPolicy"] == "Never"  # a podFailurePolicy asks for it


def test_a_misspelt_field_does_not_pass():
    manifest = rendered("toy")
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {},
        "spec": job_of(manifest) | {"podFailurePolicies": 1},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.30", strict=True)


def test_preempted_starts_again_refused_does_not_and_everything_else_is_a_failure():
    """By the words of the two interfaces: a rule's FailJob gives the Job reason and message, and JobSet reads both."""
    manifest = rendered("txt2img")
    job = job_of(manifest)
    rules = job["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob", "FailJob"]
    codes, conditions = rules[0]["onExitCodes"], rules[1]["onPodConditions"]
    refused, preempted, stuck = config.REFUSED_EXIT_CODE, runtime.PREEMPTED_EXIT_CODE, pod_script.NO_PROGRESS
    assert (codes["operator"], codes["values"]) == ("In", [refused, preempted, stuck])
    assert codes["containerName"] == container(manifest)["name"]
    assert conditions == [{"type": "DisruptionTarget", "status": "True"}]

    def action(happened: str) -> str:
        message = f"{happened} matching FailJob rule at index 0"  # the Job controller's, Kubernetes 1.26 and later
        rules = manifest["spec"]["failurePolicy"]["rules"]
        assert all(rule["onJobFailureReasons"] == ["PodFailurePolicy"] for rule in rules)
        return next(
            rule["action"] for rule in rules
            if any(re.search(one, message) for one in rule.get("onJobFailureMessagePatterns", [""]))
        )  # fmt: skip

    ends = {code: action(f"Container job for pod default/a-0 failed with exit code {code}") for code in codes["values"]}
    again = "RestartJobSetAndIgnoreMaxRestarts"
    assert ends == {refused: "FailJobSet", preempted: again, stuck: "FailJobSet"}
    assert action("Pod default/a-2-76 has condition DisruptionTarget") == again
    assert job["backoffLimit"] == 0  # any other exit: BackoffLimitExceeded, which counts towards maxRestarts


def test_a_save_has_the_time_that_every_launcher_gives():
    said = subprocess.run(
        ["bash", "-c", ". launchers/env.sh; echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT"],
        cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    grace = job_of(rendered("txt2img"))["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= int(said.stdout) + 60


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_arguments_are_a_job(overlay: str, monkeypatch: pytest.MonkeyPatch):
    """All that it reads is named, and lies where pods find it: images hold neither data nor weights."""
    said = {variable["name"]: variable.get("value") for variable in container(rendered(overlay))["env"]}
    monkeypatch.setenv("LDM_SCALE_WEIGHTS", said["LDM_SCALE_WEIGHTS"])
    script, *overrides = container(rendered(overlay))["args"]
    assert (ROOT / script).exists()
    job = config.compose(Path(script).stem, overrides)
    places = [job.data.latents, job.first_stage.checkpoint, job.conditioning.tokenizer]
    if script == "train.py":
        places.append(job.data.validation)
        assert [check.said for check in preflight.reading(job) if "is not set" in check.said] == []
    assert [place for place in places if not place.startswith("/shared/")] == []


# The pods' command ----------------------------------------------------------------------------------------------------


def pod(host: int, hosts: int, *arguments: str, processes: int, **more: str) -> subprocess.Popen[str]:
    """The manifest's command with its environment, as the first JobSet host on this machine."""
    manifest = container(rendered("toy"))
    told = {"HOSTS": str(hosts), "HOST": str(host), "RESTARTS": more.pop("restarts", "0")}
    told |= {"MASTER_ADDR": "127.0.0.1", "LDM_LOCAL": more.pop("local", "/tmp")}
    assert {*told} | {"WANDB_API_KEY", "LDM_SCALE_WEIGHTS"} == {variable["name"] for variable in manifest["env"]}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [*manifest["command"], *arguments],
        cwd=ROOT, env={**os.environ, "PATH": path, **told, "PROCESSES": str(processes), **more},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_every_process_knows_its_place_and_has_the_environment_of_the_other_launchers(tmp_path: Path):
    names = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    write = tmp_path / "write.py"
    write.write_text("import json, os; json.dump(dict(os.environ), open(__file__ + os.environ['RANK'], 'w'))")
    host = pod(1, 2, str(write), processes=2, local=str(tmp_path))
    assert (host.wait(timeout=60), host.communicate()[0]) == (0, "")
    told = [json.loads(Path(f"{write}{rank}").read_text()) for rank in (2, 3)]
    places = sorted(tuple(one[name] for name in names) for one in told)
    assert places == [("4", "2", str(rank), str(local), "127.0.0.1", "29500") for rank, local in ((2, 0), (3, 1))]
    here = subprocess.run(
        ["bash", "-c", ". launchers/env.sh; env"],
        cwd=ROOT, env={**os.environ, "LDM_LOCAL": str(tmp_path), "PROCESSES": "2"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    exported = re.findall(r"export (\w+)=", (ROOT / "launchers" / "env.sh").read_text())
    assert "TORCH_EXTENSIONS_DIR" in exported
    assert {f"{name}={told[0][name]}" for name in exported} <= {*here.stdout.splitlines()}


@pytest.mark.parametrize(("codes", "expected"), [("00", 0), ("0v", 75), ("71", 1), ("2v", 2), ("9t", 137)])
def test_a_pod_exits_as_its_processes_did(codes: str, expected: int, tmp_path: Path):
    """0 to 2: with this status; 7, v: as one that was told to stop and saved; 9: killed; t: like v, a moment later."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, signal, sys, time\n"
        "how = sys.argv[1][int(os.environ['LOCAL_RANK'])]\n"
        "time.sleep(0.5 * (how in 't1'))\n"
        "os.kill(os.getpid(), signal.SIGKILL) if how == '9' else None\n"
        "sys.exit(75 if how in 'vt7' else int(how))\n"
    )
    host = pod(0, 1, str(child), codes, processes=2)
    assert (host.wait(timeout=60), host.communicate()[0]) == (expected, "")


def test_processes_that_wait_for_a_failed_one_are_ended(tmp_path: Path):
    child = tmp_path / "child.py"
    child.write_text("import os, sys, time; time.sleep(60) if os.environ['LOCAL_RANK'] == '1' else sys.exit(3)")
    code = "import sys, pod; pod.PATIENCE_S = 0.5; sys.exit(pod.main(sys.argv[1:]))"
    place = {"HOSTS": "1", "HOST": "0", "PROCESSES": "2", "PYTHONPATH": str(K8S)}
    ended = subprocess.run([sys.executable, "-c", code, str(child)], env={**os.environ, **place}, timeout=30)
    assert ended.returncode == 3


def test_three_attempts_without_progress_are_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Preempted, drained or failed; what is begun by a person counts anew."""
    run = RunDir(tmp_path / "run")

    def attempts(*counts: int) -> list[bool]:
        said = []
        for count in counts:
            monkeypatch.setenv("RESTARTS", str(count))
            said.append(bool(pod_script.barren(["train.py", "name=a", f"run_dir={run.path}"])))
        return said

    assert attempts(0, 1, 2, 3, 4) == [False, False, False, True, True]
    assert attempts(0, 1, 2) == [False] * 3
    (run.checkpoints / "images_000000000008").mkdir(parents=True)
    (run.checkpoints / "images_000000000008" / "complete.json").touch()
    assert attempts(3, 4, 5, 6) == [False, False, False, True]
    kept = run.evaluation / "000000000008_ema.unfinished" / "000000016.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert attempts(7, 8, 9, 10) == [False, False, False, True]
    assert pod_script.barren(["sample.py", f"run_dir={run.path}"]) == ""
    last = pod(0, 1, "train.py", f"run_dir={run.path}", processes=1, restarts="7", local=str(tmp_path))
    assert (
        last.wait(timeout=60) == pod_script.NO_PROGRESS and f"left nothing new in {run.path}" in last.communicate()[0]
    )


def test_told_to_stop_before_python_listens_is_preempted_too(tmp_path: Path):
    child = tmp_path / "child.py"
    child.write_text("import os, time; os.write(1, b'up\\n'); time.sleep(60)\n")
    with closing(started(pod(0, 1, str(child), processes=2))) as host:
        next(host).send_signal(signal.SIGTERM)
        assert next(host).wait(timeout=20) == runtime.PREEMPTED_EXIT_CODE


def started(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, once both of its children have said something; killed in the end."""
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
        while True:
            yield process
    finally:
        process.kill()


@pytest.mark.slow
def test_two_pods_train_and_one_that_is_drained_ends_both_as_preempted(tmp_path: Path):
    write_world(tmp_path / "toy", Recipe(train=48, val=8, objects=1, size=32, shard_size=48, seed=0))
    run = RunDir(tmp_path / "run")
    arguments = [
        "train.py", "+experiment=autoencoder_kl_f4", "scale=toy", f"data.images={tmp_path}/toy/train",
        f"data.validation={tmp_path}/toy/val", "first_stage.channels=8", "total_images=1_000_000", "every.log=64",
        "every.sample=0", "every.evaluate=0", f"run_dir={run.path}", "engine=ddp", "micro_batch=8", "global_batch=16",
        "tracker.wandb=false",
    ]  # fmt: skip
    pods = [pod(host, 2, *arguments, processes=1, local=str(tmp_path)) for host in range(2)]
    try:
        until = time.monotonic() + 120
        while not run.read_lines(run.metrics):
            assert time.monotonic() < until and all(host.poll() is None for host in pods)
            time.sleep(0.1)
        pods[1].send_signal(signal.SIGTERM)
        said = [host.communicate(timeout=120)[0] for host in pods]
    finally:
        for host in pods:
            host.kill()
    assert [host.returncode for host in pods] == [75, 75], said
    status = storage.read_json(run.status)
    assert status["state"] == "preempted"
    assert complete_ones(run.checkpoints)[0].name == f"images_{status['images']:012d}"
