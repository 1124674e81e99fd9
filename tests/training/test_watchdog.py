"""The watchdog, on real processes that sleep, are killed, or take their time for a reason."""

import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "watched.py"


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    why: str
    stacks: dict[str, str]
    said: dict[str, str]


def watched(out: Path, what: str, chosen: int, *, processes: int) -> Ended:
    """Start processes as a launcher would, but for its agent, which would end the others by itself."""
    command = [sys.executable, str(SCRIPT), str(out), what, str(chosen)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    where["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja
    ranks = [{**where, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [subprocess.Popen(command, env=os.environ | rank, stderr=subprocess.DEVNULL) for rank in ranks]
    if what == "dark":  # as a host without power, or without a cable: its connections stay open
        started[1 - chosen].wait(60)
        started[chosen].kill()
    codes = [process.wait(60) for process in started]
    why = out / "why.txt"
    return Ended(
        codes,
        why.read_text() if why.exists() else "",
        {file.stem: file.read_text() for file in out.glob("stacks/*.txt")},
        {file.stem: file.read_text() for file in out.glob("[0-9].txt")},
    )


def test_a_process_that_hangs_says_where_and_ends(tmp_path: Path) -> None:
    ended = watched(tmp_path, "sleep", 0, processes=1)
    assert ended.codes == [1]
    assert "in snore" in ended.stacks["rank0"]
    assert "a global batch takes longer than guard.watchdog_minutes=0.03" in ended.why


@pytest.mark.slow
def test_when_one_rank_hangs_every_rank_says_where_and_ends(tmp_path: Path) -> None:
    ended = watched(tmp_path, "sleep", 1, processes=2)
    assert ended.codes == [1, 1]
    assert "in snore" in ended.stacks["rank1"] and "in all_reduce" in ended.stacks["rank0"]
    assert ended.why.startswith("rank 1 on ") and "hangs" in ended.why


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_other_with_the_reason(lost: int, tmp_path: Path) -> None:
    ended = watched(tmp_path, "lost", lost, processes=2)
    assert ended.codes[lost] == -signal.SIGKILL and ended.codes[1 - lost] == 1
    told = ended.why + ended.said.get(str(1 - lost), "")  # by whichever of its threads was first
    assert f"rank {lost}" in told and "was lost" in told


@pytest.mark.slow
def test_where_rank_0_goes_dark_the_other_ends_with_the_reason(tmp_path: Path) -> None:
    ended = watched(tmp_path, "dark", 0, processes=2)
    assert ended.codes[1] == 1
    assert ended.why == "rank 0 was lost: it does not answer rank 1"
    assert "in all_reduce" in ended.stacks["rank1"]


@pytest.mark.slow
def test_an_error_of_one_rank_alone_under_zero_is_the_reason_of_both(tmp_path: Path) -> None:
    ended = watched(tmp_path, "evaluate", 1, processes=2)
    assert ended.codes == [1, 1]
    told = ended.why + ended.said.get("0", "")  # by whichever of its threads was first
    assert "rank 1 on " in told and told.strip().endswith("OSError: a picture on this host is gone")


@pytest.mark.slow
def test_a_phase_may_take_longer(tmp_path: Path) -> None:
    ended = watched(tmp_path, "patient", 1, processes=2)
    assert (ended.codes, ended.said, ended.stacks) == ([0, 0], {"0": "done", "1": "done"}, {})
