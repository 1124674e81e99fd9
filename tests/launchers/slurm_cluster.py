"""A Slurm of our own: munge, a controller and three nodes on this machine, of Debian's packages; gone when closed."""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NODES = ("n1", "n2", "n3")
_WAIT_S = 300.0  # on a machine with others; 20 where it is quiet
_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={path}/munge.socket
StateSaveLocation={path}/state
SlurmdSpoolDir={path}/%n
SlurmctldPidFile={path}/slurmctld.pid
SlurmdPidFile={path}/%n.pid
SlurmctldLogFile={path}/slurmctld.log
SlurmdLogFile={path}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=10
KillWait=10
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n[1-3] Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=n[1-3] State=UP PriorityTier=2
"""


def missing() -> list[str]:
    """Programs of Slurm that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]


class Cluster:
    """As a context manager: started, with both nodes idle; at the end nothing of it is left running."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._daemons: list[subprocess.Popen[bytes]] = []
        foreign = ("SLURM", "SBATCH", "ACCELERATE_")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(foreign)},
            "SLURM_CONF": str(path / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{_PATH}",
            "OMP_NUM_THREADS": "1",
            "LDM_LOCAL": str(path / "local"),
        }

    def __enter__(self) -> "Cluster":
        (self.path / "state").mkdir(parents=True)
        for node in NODES:
            (self.path / node).mkdir()
        config = _CONFIG.format(
            host=socket.gethostname().partition(".")[0], path=self.path, ports=_free_ports(4), user=getpass.getuser()
        )
        (self.path / "slurm.conf").write_text(config)
        (self.path / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.path / "munge.key").chmod(0o400)
        files = [f"--{name}-file={self.path}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.path}/munge.socket", *files)
        _until(lambda: (self.path / "munge.socket").exists(), self.said)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        _until(lambda: self.ask("sinfo", "--noheader", "--format=%T").split() == ["idle"], self.said)
        return self

    def __exit__(self, *_: object) -> None:
        self._kill(lambda said: True)
        for daemon in self._daemons:
            daemon.wait()

    def start_node(self, node: str) -> None:
        """Start the daemon of one node; all that it starts carries its name."""
        self._daemon("slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def kill_node(self, node: str) -> None:
        """End its daemon and all that runs under it at once, as a power cut would."""
        self._kill(lambda said: said.get("SLURMD_NODENAME") == node)

    @contextmanager
    def controller_away(self) -> Iterator[None]:
        """While it lasts, slurmctld answers nobody."""
        (controller,) = (found for found in self._processes(lambda said: True) if found.name() == "slurmctld")
        controller.suspend()
        yield
        controller.resume()

    def training(self, run: Path) -> list[psutil.Process]:
        """The processes that train in `run`."""
        found = []
        for process in self._processes(lambda said: "SLURM_PROCID" in said):
            with suppress(psutil.NoSuchProcess):  # a shell on its way to become one
                if f"run_dir={run}" in process.cmdline() and process.name().startswith("python"):
                    found.append(process)
        return found

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Type `launchers/slurm/submit` in `cwd`, which must succeed; returns the job's number."""
        script = Path(__file__).parents[2] / "launchers/slurm/submit"
        done = self.type(str(script), *arguments, cwd=cwd, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1].rstrip(":")

    def type(self, *command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the cluster's environment."""
        known = {**self.environment, **environment}
        return subprocess.run(command, cwd=cwd, env=known, capture_output=True, text=True, timeout=_WAIT_S)

    def ask(self, *command: str) -> str:
        """What a command prints."""
        return self.type(*command, cwd=self.path).stdout

    def state(self, job: str) -> str:
        """Slurm's word for how a job stands."""
        return self._shown(job).get("JobState", "")

    def _shown(self, job: str) -> dict[str, str]:
        return dict(
            word.split("=", 1) for word in self.ask("scontrol", "show", "job", "-o", job).split() if "=" in word
        )

    def minutes(self, job: str) -> int:
        """Whole minutes since it was started."""
        *hours, minutes, _ = self.ask("squeue", "--noheader", f"--jobs={job}", "--format=%M").strip().split(":")
        return 60 * int(hours[0] if hours else 0) + int(minutes)

    def wait(self, condition: Callable[[], bool], log: Path) -> None:
        """Wait until a condition is true."""
        _until(condition, lambda: log.read_text() if log.exists() else self.said())

    def requeued(self, job: str, times: int, log: Path) -> None:
        """Wait until a job is in the queue again, and spare it most of the two minutes that Slurm has it wait there."""

        def back() -> bool:
            shown = self._shown(job)
            return int(shown["Restarts"]) == times and shown["JobState"] in ("PENDING", "RUNNING")

        self.wait(back, log)
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+2")  # earlier, its credential is still revoked

    def said(self) -> str:
        """The logs of the daemons."""
        return "".join(file.read_text() for file in sorted(self.path.glob("*.log")))

    def _daemon(self, *command: str, **environment: str) -> None:
        with open(self.path / f"{command[0]}.out", "a") as out:
            known = {**self.environment, **environment}
            self._daemons.append(subprocess.Popen(command, env=known, stdout=out, stderr=out, start_new_session=True))

    def _kill(self, which: Callable[[dict[str, str]], bool]) -> None:
        found = self._processes(which)
        for number in (signal.SIGSTOP, signal.SIGKILL):  # none is left to tell of another's end
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def _processes(self, which: Callable[[dict[str, str]], bool]) -> list[psutil.Process]:
        """Daemons, scripts and tasks of this cluster, by what their environment says."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                said = process.environ()
                if process.name() == "slurmstepd":  # writes its title over its environment, but has its node's log open
                    logs = [Path(file.path) for file in process.open_files()]
                    nodes = [log.stem for log in logs if log.parent == self.path]
                    said = {**self.environment, "SLURMD_NODENAME": nodes[0]} if nodes else {}
                if said.get("SLURM_CONF") == self.environment["SLURM_CONF"] and which(said):
                    found.append(process)
        return found


def finished_pieces(script: str) -> str:
    """A job's line about its finished pieces, of which it holds one for every attempt."""
    functions = script.partition("# This script runs on the first host")[0]
    environment = {**os.environ, "SLURM_JOB_ID": "1"}
    command = ["bash", "-c", f"{functions}\npieces"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def _until(condition: Callable[[], bool], said: Callable[[], str]) -> None:
    until = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < until, said()
        time.sleep(0.05)
