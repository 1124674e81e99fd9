"""What a pod runs: one process of the job per GPU, without an agent between them and Kubernetes.

    python launchers/k8s/pod.py train.py +experiment=NAME ...

From the environment: HOSTS pods, of which this is number HOST, MASTER_ADDR, the first one, and RESTARTS of them all so
far, set by the manifest; PROCESSES of this pod, set by launchers/env.sh. SIGTERM and SIGUSR1 reach every process.

Where three attempts in a row of a training or a precomputation finished nothing (a checkpoint, a batch of an
evaluation, a shard), there is no fourth: the first host keeps count, beside the directory that `run_dir=` or
`data.latents=` names.

exits  0 every process finished, 75 the job was told to stop and has saved, 76 no progress, else as the first process
       that failed
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

PREEMPTED = 75  # ldm_scale.core.runtime.PREEMPTED_EXIT_CODE, without the seconds that importing torch takes
NO_PROGRESS = 76
ATTEMPTS = 3
KEPT = "[0-9]" * 9 + ".safetensors"  # jobs/kept.py
WORK = {
    "train.py": ("run_dir=", ["complete.json", KEPT]),
    "precompute_latents.py": ("data.latents=", ["*.done.json"]),
}
"""What names the place of a job's work, and what its finished pieces are called."""
PATIENCE_S = 60.0
"""After one process failed the others end by themselves within a minute, with the reason, if they ever met."""


def main(command: Sequence[str]) -> int:
    """Start the processes, hand signals on, wait; returns the exit code."""
    hosts, host, processes = (int(os.environ[name]) for name in ("HOSTS", "HOST", "PROCESSES"))
    if host == 0 and (why := barren(command)):
        print(why, file=sys.stderr)
        return NO_PROGRESS
    world = {"WORLD_SIZE": str(hosts * processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": "29500"}
    children: list[subprocess.Popen[bytes]] = []
    told = []

    def hand_on(number: int, _: FrameType | None) -> None:
        told.append(number)
        for child in children:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, hand_on)
    signal.signal(signal.SIGUSR1, hand_on)
    for local in range(processes):
        ranks = {"RANK": str(host * processes + local), "LOCAL_RANK": str(local)}
        children.append(subprocess.Popen([sys.executable, *command], env={**world, **os.environ, **ranks}))
    failed, since = 0, float("inf")
    while any(child.poll() is None for child in children):
        time.sleep(0.2)
        failed = failed or next((code for child in children if (code := _code(child, told)) not in (0, PREEMPTED)), 0)
        since = min(since, time.monotonic()) if failed else since
        if time.monotonic() - since > PATIENCE_S:
            for child in children:
                child.kill()
    return failed or max(_code(child, told) for child in children)


def barren(command: Sequence[str]) -> str:
    """Why not to begin again; else empty, and one attempt more is on record."""
    key, pieces = WORK.get(command[0], ("", []))
    place = next((text.removeprefix(key) for text in reversed(command) if key and text.startswith(key)), "")
    if not place:
        return ""
    begun = Path(f"{place}.begun")
    finished = str(sorted(str(file) for piece in pieces for file in Path(place).rglob(piece)))
    before = begun.read_text().splitlines() if begun.exists() and os.environ["RESTARTS"] != "0" else []
    if before[-ATTEMPTS:] == [finished] * ATTEMPTS:
        return (
            f"{ATTEMPTS} attempts in a row left nothing new in {place}: look into their logs, then apply the job again"
        )
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text("\n".join([*before[1 - ATTEMPTS :], finished]))
    return ""


def _code(child: "subprocess.Popen[bytes]", told: Sequence[int]) -> int:
    """A child's exit status as a shell gives it, 0 while it runs; one told to stop before it listened lost nothing."""
    code = child.poll() or 0
    return PREEMPTED if -code in told else 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
