"""Claims of processes that share a folder: exclusive among the living, free after death."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ldm_scale.core import storage
from ldm_scale.jobs.claims import Claims, _began, here


def wait_for(condition: object, seconds: float = 5.0) -> bool:
    assert callable(condition)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return False


def foreign(folder: Path, *, pid: int = 1, name: str = "00000.tar", **where: str) -> Path:
    """A claim as another process left it, on this host unless told otherwise."""
    path = folder / f"{name}.claim"
    storage.write_json(path, {"owner": "another", **here(), **where, "pid": pid, "began": "1", "time": 0.0})
    return path


def test_one_of_two_gets_it_and_the_other_after_it(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as one, Claims(tmp_path / "claims") as two:
        assert one.take("a") and not two.take("a") and two.take("b")
        assert one.holds("a") and not two.holds("a")
        one.release("a")
        assert two.take("a")
    assert not (tmp_path / "claims").exists(), "nothing is left behind"


def test_a_claim_of_a_process_that_is_gone_is_free_at_once(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    foreign(tmp_path, pid=int(gone.stdout))
    with Claims(tmp_path) as claims:
        assert claims.take("00000.tar")


def test_another_process_under_the_old_number_is_not_the_owner(tmp_path: Path) -> None:
    foreign(tmp_path, pid=os.getpid())  # which began later than the first tick
    foreign(tmp_path, pid=os.getpid(), name="container", kernel="another one")
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    with Claims(tmp_path) as claims:
        assert claims.take("00000.tar") and claims.lives("00000.tar")
        assert not claims.take("container") and claims.lives("container") is None
        assert wait_for(lambda: _began(zombie.pid) == "")
    zombie.wait()


def test_a_claim_on_another_host_is_free_when_it_shows_no_life(tmp_path: Path) -> None:
    path = foreign(tmp_path, host="elsewhere")
    os.utime(path, (0, 0))  # its clock may be anything: only that the time stands still counts
    with Claims(tmp_path, stale_s=0.4) as claims:
        assert not claims.take("00000.tar")
        time.sleep(0.3)
        os.utime(path, (10, 10))
        assert not claims.take("00000.tar")
        time.sleep(0.3)
        assert not claims.take("00000.tar"), "it moved 0.3 s ago"
        assert wait_for(lambda: claims.take("00000.tar"))


def test_the_living_keep_their_claims(tmp_path: Path) -> None:
    with Claims(tmp_path, stale_s=0.4) as one, Claims(tmp_path, stale_s=0.4) as two:
        assert one.take("a")
        assert not wait_for(lambda: two.take("a"), seconds=1.2)


def test_who_was_taken_for_dead_knows_it(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        assert claims.take("00000.tar")
        path = foreign(tmp_path, host="elsewhere")
        assert not claims.holds("00000.tar")
        claims.release("00000.tar")
        assert path.exists(), "the other one's claim stays"
        path.unlink()


@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_claim_whose_owner_died_writing_it_goes_stale(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.claim").write_bytes(content)
    with Claims(tmp_path, stale_s=0.2) as claims:
        assert not claims.take("a")
        assert wait_for(lambda: claims.take("a"))


def test_sweeping_takes_the_claims_of_the_dead_only(tmp_path: Path) -> None:
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert one.take("a")
        foreign(tmp_path, pid=2**22 + 1)  # beyond the largest process id
        two.sweep()
        assert [path.name for path in tmp_path.glob("*.claim")] == ["a.claim"]


def test_the_last_to_leave_removes_the_folder_and_whoever_comes_then_makes_it_again(tmp_path: Path) -> None:
    def come_and_go(name: str) -> int:
        taken = 0
        for _ in range(300):
            with Claims(tmp_path / "run" / "claims") as claims:
                taken += claims.take(name)
        return taken

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(come_and_go, "abcd")) == [300] * 4
    assert not (tmp_path / "run" / "claims").exists()


def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "claims").symlink_to(tmp_path / "nowhere" / "claims")
    with Claims(tmp_path / "claims") as claims, pytest.raises(FileNotFoundError, match="claims"):
        claims.take("a")
