"""Two hosts on this machine: each a network namespace with a name of its own, a cable between them, the disk shared."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMES = ("host0", "host1")
_ADDRESSES = ("10.213.0.1", "10.213.0.2")
_SETTINGS = Path("/etc/netns")  # `ip netns exec` puts a namespace's files from here in the place of /etc's
_WAIT_S = 180.0
_CABLE = "cable0"


class HostPair:
    """Hosts 0 and 1."""

    def __init__(self, spaces: tuple[str, str]) -> None:
        self._spaces = spaces

    def start(self, host: int, log: Path, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start a command line in the project's folder on one host; what it says goes to the end of `log`."""
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', NAMES[host], *command]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(log, "ab") as said:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts", *named],
                cwd=ROOT, env={**os.environ, "PATH": path, **environment}, stdout=said, stderr=said,
            )  # fmt: skip

    def processes(self, host: int) -> list[int]:
        """What runs on a host."""
        done = subprocess.run(["ip", "netns", "pids", self._spaces[host]], capture_output=True, text=True, check=True)
        return [int(pid) for pid in done.stdout.split()]

    def kill(self, host: int) -> None:
        """Kill all that runs on a host, at once."""
        while pids := self.processes(host):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def cable(self, *, plugged: bool) -> None:
        _ip("-n", self._spaces[1], "link", "set", _CABLE, "up" if plugged else "down")

    def _make(self) -> None:
        for space in self._spaces:
            _ip("netns", "add", space)
        one, other = self._spaces
        _ip("link", "add", _CABLE, "netns", one, "type", "veth", "peer", "name", _CABLE, "netns", other)
        for host, (space, address) in enumerate(zip(self._spaces, _ADDRESSES, strict=True)):
            (_SETTINGS / space).mkdir(parents=True)
            (_SETTINGS / space / "resolv.conf").touch()  # no name server
            # As Debian sets up a machine: its own name is not its address on the network.
            known = ["127.0.0.1 localhost", f"127.0.1.1 {NAMES[host]}", f"{_ADDRESSES[1 - host]} {NAMES[1 - host]}"]
            (_SETTINGS / space / "hosts").write_text("\n".join(known))
            _ip("-n", space, "address", "add", f"{address}/24", "dev", _CABLE)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", _CABLE, "up")


@contextmanager
def host_pair() -> Iterator[HostPair]:
    """Two hosts while it lasts.

    raises  OSError where this machine lets nobody make them
    """
    name = f"ldm{secrets.token_hex(3)}"
    hosts = HostPair((f"{name}a", f"{name}b"))
    try:
        hosts._make()
        yield hosts
    finally:
        for host in (0, 1):
            with suppress(OSError):
                hosts.kill(host)
                _ip("netns", "delete", hosts._spaces[host])
            shutil.rmtree(_SETTINGS / hosts._spaces[host], ignore_errors=True)


def wait_for(condition: Callable[[], bool], *processes: subprocess.Popen[bytes]) -> bool:
    """Wait until a condition is true; False where one of the processes ended before."""
    until = time.monotonic() + _WAIT_S
    while not condition():
        if any(process.poll() is not None for process in processes):
            return False
        assert time.monotonic() < until, "nothing came of it"
        time.sleep(0.02)
    return True


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
