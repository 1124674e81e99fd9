import os
import signal

import pytest

from ldm_scale.core import progress, runtime


def test_a_gpu_that_cuda_cannot_use_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(RuntimeError, match=r"driver 470\.82.*torch .* built for CUDA"):
        runtime.require_usable_gpu(gpu_present=True, driver="470.82")
    runtime.require_usable_gpu(gpu_present=False, driver="unknown")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    runtime.require_usable_gpu(gpu_present=True, driver="470.82")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_remembers_a_signal(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        preemption = runtime.Preemption()
        assert not preemption.agreed()
        os.kill(os.getpid(), number)
        assert preemption.agreed()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_rank_and_world_come_from_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (runtime.rank(), runtime.world(), runtime.is_main()) == (3, 8, False)


def test_progress_speaks_in_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("encoding", 10, unit="images") as bar:
        bar.advance(4)
        bar.move(10, "done")
    said = capsys.readouterr().err
    assert "encoding: 10/10 images" in said
    assert said.count("\n") == 1


def test_progress_is_silent_on_other_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with progress.bar("encoding", 10) as bar:
        bar.move(10)
    assert capsys.readouterr().err == ""
