import os
import resource
import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch

from ldm_scale.core import storage
from ldm_scale.training import checkpoint_writer
from ldm_scale.training.checkpoint import Checkpoints, require_grace
from ldm_scale.training.checkpoint_files import HELD, CheckpointError, damage, find, read_consolidated


@pytest.fixture
def training(tmp_path):
    training = tiny.Training(tiny.engine_of("one_process"), tmp_path / "checkpoints")
    training.run(1)
    yield training
    training.engine.close()


def policy(training: tiny.Training, **how) -> Checkpoints:
    directory = training.checkpoints.path(0).parent
    return Checkpoints(
        directory, masters=training.engine.masters, ema=training.ema, module=training.engine.module, **how
    )


def names(training: tiny.Training) -> list[int]:
    directory = training.checkpoints.path(0).parent
    return sorted(int(path.name.removeprefix("images_")) for path in directory.glob("images_*"))


def test_resume_is_the_same_run_bit_for_bit(reference, tmp_path):
    training = tiny.Training(tiny.engine_of("one_process"), tmp_path)
    training.resume(reference["checkpoint"])
    assert training.images_seen == 320
    assert training.run(10) == reference["losses"][-10:]
    everything = training.everything()
    assert everything is not None
    for name, tensor in reference["everything"].items():
        assert torch.equal(tensor, everything[name]), name
    training.engine.close()


def test_state_comes_back_and_buffers_too(training):
    path = training.save()
    training.engine.module.latent_scale.fill_(9.0)
    assert training.checkpoints.load(path) == {"images_seen": 8, "wandb_id": "abc"}
    assert training.engine.module.latent_scale == torch.tensor(tiny.LATENT_SCALE)
    assert training.engine.masters.step == 1


def test_a_log_line_tells_what_a_crash_would_cost(training, tmp_path):
    """From the beginning until something is complete; then from the weights in it, and not from when it was written."""
    checkpoints = training.checkpoints
    told = checkpoints.numbers(training.images_seen)
    assert told["perf/unsaved_images"] == 8 and "perf/save_s" not in told
    assert told["perf/disk_free_gb"] == pytest.approx(
        os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 1e9, abs=1
    )
    training.run(1)
    checkpoints.save({"images_seen": training.images_seen})
    training.run(1)
    assert checkpoints.numbers(training.images_seen)["perf/unsaved_images"] == 24  # it is not known to be complete
    checkpoints.drain()
    time.sleep(0.1)
    told = checkpoints.numbers(training.images_seen)
    assert told["perf/unsaved_images"] == 8 and 0 < told["perf/save_s"] < 60 * told["perf/unsaved_minutes"] < 60
    training.run(1)
    training.resume(checkpoints.path(16))
    assert checkpoints.numbers(training.images_seen)["perf/unsaved_images"] == 0
    tmp_path.rename(gone := tmp_path.with_name(f"{tmp_path.name}_gone"))
    assert "perf/disk_free_gb" not in checkpoints.numbers(training.images_seen)
    gone.rename(tmp_path)


def test_a_launcher_that_would_kill_a_save_is_refused(training, monkeypatch, caplog):
    path = training.save()
    require_grace(path.parent)  # started by hand: nobody kills it
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    require_grace(path.parent)
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0.5")
    with pytest.raises(ValueError, match=r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=0\.5: .*launch with 1 seconds or more"):
        require_grace(path.parent)
    training.save()
    assert "The next launch is refused" in caplog.text
    training.checkpoints.save({"images_seen": 8}, stop_s=100.0)
    training.checkpoints.drain()
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
    with pytest.raises(ValueError, match=r"after steps of 100 s: launch with 10\d seconds"):
        require_grace(path.parent)
    (path / "complete.json").write_text("{")
    require_grace(path.parent)


def test_the_file_is_plain_safetensors(training):
    path = training.save()
    tensors = safetensors.torch.load_file(path / "rank00000-of-00001.safetensors")
    assert torch.equal(tensors["weight:conv.weight:0"], training.engine.module.conv.weight.detach().flatten())
    assert torch.equal(tensors["ema/400:gain:0"], training.ema.shadows[400][0])
    kinds = {name.split(":")[0] for name in tensors}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "ema/4", "ema/400"}
    meta = storage.read_json(path / "complete.json")
    assert {"torch", "deepspeed", "ldm_scale", "python"} <= meta["versions"].keys()


def test_consolidated_fits_the_module(training):
    training.run(3)
    path = training.save()
    state, tensors = read_consolidated(path, "ema/4")
    assert state["images_seen"] == 32
    model = tiny.tiny()
    model.load_state_dict(tensors, strict=True)
    averaged = training.ema.consolidated(4)
    assert averaged is not None
    assert all(torch.equal(p, averaged[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="holds no 'ema/7'; it holds weight, exp_avg"):
        read_consolidated(path, "ema/7")


def cut(path: Path) -> None:
    file = path / "rank00000-of-00001.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def flip(path: Path) -> None:
    file = path / "rank00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def lose(path: Path) -> None:
    (path / "buffers.safetensors").unlink()


def cut_meta(path: Path) -> None:
    os.truncate(path / "complete.json", 200)


def edit_meta(path: Path) -> None:
    text = (path / "complete.json").read_text()
    (path / "complete.json").write_text(text.replace('"wandb_id": "abc"', '"wandb_id": "abd"'))


@pytest.mark.parametrize("damage", [cut, flip, lose, cut_meta, edit_meta])
def test_a_damaged_one_is_reported_and_the_one_before_it_is_used(damage, training):
    first = training.save()
    training.run(1)
    second = training.save()
    damage(second)
    told = []
    checkpoints = policy(training, on_damaged=lambda path, reason: told.append((path, reason)))
    assert checkpoints.latest() == first
    assert told[0][0] == second
    assert told[0][1]
    assert find(first.parent) == first
    with pytest.raises(CheckpointError, match="is damaged"):
        policy(training).load(second)
    with pytest.raises(CheckpointError, match="is damaged"):
        find(first.parent, second.name)


def test_without_complete_json_there_is_no_checkpoint(training):
    path = training.save()
    (path / "complete.json").unlink()
    assert training.checkpoints.latest() is None
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        find(path.parent)
    with pytest.raises(FileNotFoundError, match="complete ones, newest first: none"):
        find(path.parent, path.name)


def test_another_architecture_is_refused_by_names(training, tmp_path):
    path = training.save()
    engine = tiny.engine_of("one_process", width=4)
    engine.module.register_buffer("extra", torch.zeros(2))
    other = tiny.Training(engine, tmp_path)
    with pytest.raises(ValueError) as refused:
        other.checkpoints.load(path)
    message = str(refused.value)
    assert "holds another architecture" in message
    assert "1 missing: extra" in message
    assert "conv.weight (8, 3, 3, 3), wanted (4, 3, 3, 3)" in message
    engine.close()


def test_an_average_the_checkpoint_lacks_starts_at_its_weights(training, monkeypatch, tmp_path):
    training.run(3)
    path = training.save()
    monkeypatch.setattr(tiny, "HALF_LIVES", [400, 7])
    other = tiny.Training(tiny.engine_of("one_process"), tmp_path)
    other.resume(path)
    for old, kept, new, weight in zip(
        training.ema.shadows[400],
        other.ema.shadows[400],
        other.ema.shadows[7],
        other.engine.masters.tensors,
        strict=True,
    ):
        assert torch.equal(old, kept)
        assert torch.equal(new, weight)
    other.engine.close()


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, 0, [80]), (2, 0, [72, 80]), (1, 32, [32, 64, 80]), (1, 20, [24, 40, 64, 80]), (20, 0, list(range(8, 88, 8)))],
)
def test_policy_keeps_the_last_and_every_so_many_images(keep_last, keep_every, kept, training):
    checkpoints = policy(training, keep_last=keep_last, keep_every_images=keep_every)
    for images_seen in range(8, 88, 8):
        checkpoints.save({"images_seen": images_seen})
    checkpoints.drain()
    assert names(training) == kept


def test_the_policy_keeps_what_somebody_reads(training):
    checkpoints = policy(training, keep_last=1)
    for images_seen in range(8, 40, 8):
        checkpoints.save({"images_seen": images_seen})
        checkpoints.drain()
        if images_seen == 16:
            (checkpoints.path(16) / HELD).touch()
    assert names(training) == [16, 32] and damage(checkpoints.path(16)) is None
    (checkpoints.path(16) / HELD).unlink()
    checkpoints.save({"images_seen": 40})
    checkpoints.drain()
    assert names(training) == [40]


def test_a_damaged_checkpoint_does_not_count_as_kept(training):
    first = training.save()
    training.run(1)
    flip(training.save())
    checkpoints = policy(training, keep_last=2)
    assert checkpoints.latest() == first
    checkpoints.save({"images_seen": 24})
    checkpoints.drain()
    assert names(training) == [8, 16, 24]


def test_policies_that_could_delete_the_only_one_are_refused(training):
    with pytest.raises(ValueError, match="keep_last=0"):
        policy(training, keep_last=0)


def test_the_same_images_can_be_saved_again(training):
    training.save()
    path = training.checkpoints.save({"images_seen": 8, "wandb_id": "second"})
    training.checkpoints.drain()
    assert policy(training).load(path)["wandb_id"] == "second"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_rollback_puts_newer_ones_out_of_the_way(training):
    checkpoints = policy(training, keep_last=5)
    for images_seen in (8, 16, 24):
        checkpoints.save({"images_seen": images_seen})
    renamed = checkpoints.abandon_newer(checkpoints.path(8))  # the last one may still be under way: it counts too
    assert [old.name for old in renamed] == ["images_000000000024", "images_000000000016"]
    assert checkpoints.latest() == checkpoints.path(8)
    for images_seen in (16, 32):
        checkpoints.save({"images_seen": images_seen})
    checkpoints.abandon_newer(checkpoints.path(8))  # over one of them again; those of before are gone
    left = ["images_000000000008", "images_000000000016.abandoned", "images_000000000032.abandoned"]
    assert sorted(path.name for path in checkpoints.path(8).parent.iterdir()) == left


@contextmanager
def full_disk():
    """A limit on file size stands in for it: both make write() fail in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_leaves_the_earlier_ones_and_asks_for_another(training):
    told = []
    checkpoints = policy(training, max_unsaved_minutes=0.01, on_failed=lambda *failure: told.append(failure))
    first = checkpoints.save({"images_seen": 8})
    checkpoints.drain()
    assert not checkpoints.poll()
    with full_disk():
        second = checkpoints.save({"images_seen": 16})
        while not checkpoints.poll():
            time.sleep(0.01)
    assert [(path, "File too large" in reason) for path, reason in told] == [(second, True)]
    assert [entry.name for entry in first.parent.iterdir()] == [first.name]
    assert checkpoints.latest() == first
    third = checkpoints.save({"images_seen": 24})
    checkpoints.drain()
    assert not checkpoints.poll()
    assert checkpoints.latest() == third
    assert len(told) == 1


def test_the_last_save_is_tried_again_until_there_is_room(training):
    checkpoints = policy(training, max_unsaved_minutes=0.1)
    with full_disk():
        checkpoints.save({"images_seen": 16})
        while not checkpoints.poll():
            time.sleep(0.01)
    checkpoints.drain()
    assert checkpoints.latest() == checkpoints.path(16)


def test_saves_that_fail_for_too_long_are_an_error(training):
    checkpoints, told = policy(training, max_unsaved_minutes=0.005), []
    first = checkpoints.save({"images_seen": 8})
    checkpoints.drain()
    patient = policy(training, max_unsaved_minutes=0.005, on_failed=lambda *failure: told.append(failure))
    patient.save({"images_seen": 16})
    patient.drain()
    with full_disk(), pytest.raises(CheckpointError, match=r"File too large.*max_unsaved_minutes=0\.005"):
        patient.save({"images_seen": 24})
        patient.drain()
    assert 1 < len(told) <= 12
    assert find(first.parent).name == "images_000000000016"
    assert names(training) == [8, 16]


def test_training_goes_on_beside_a_save(training, monkeypatch):
    """What is saved is the moment of `save`, however long the writing takes."""
    writes = threading.Event()
    write = checkpoint_writer._write_floats

    def slowly(*arguments):
        writes.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer, "_write_floats", slowly)
    expected = training.everything()
    state = {"images_seen": 8, "of": {"the": ["moment"]}}
    path = training.checkpoints.save(state)
    state["of"]["the"].append("later")
    assert training.checkpoints.poll() is False
    training.run(2)
    training.engine.module.latent_scale.fill_(9.0)
    assert not path.exists()
    writes.set()
    training.checkpoints.drain()
    assert find(path.parent) == path
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema/4", "ema/400"):
        saved, tensors = read_consolidated(path, kind)
        assert saved["of"] == {"the": ["moment"]}
        assert tensors["latent_scale"] == torch.tensor(tiny.LATENT_SCALE)
        assert all(torch.equal(t, expected[f"{kind}:{n}"]) for n, t in tensors.items() if n != "latent_scale")


def test_host_memory_is_taken_once(training):
    training.save()
    held = training.checkpoints._host.data_ptr()
    training.run(1)
    training.save()
    assert training.checkpoints._host.data_ptr() == held
    training.checkpoints.release()
    assert training.checkpoints._host is None


def killed_at(training: tiny.Training, moment: int) -> bool:
    """Save in a child that is killed at its n-th touch of the checkpoint directory; False when it lived to the end."""
    child = os.fork()
    if child == 0:
        directory, touches = str(training.checkpoints.path(0).parent), 0

        def kill(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal touches
            if arguments and isinstance(arguments[0], (str, os.PathLike)) and str(arguments[0]).startswith(directory):
                touches += 1
                if touches == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(kill)
        training.save()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_moment_the_latest_is_whole(training):
    first = training.save()
    training.run(1)
    found, moment = [first], 1
    while killed_at(training, moment):
        latest = policy(training).latest()
        assert latest is not None
        found.append(latest)
        moment += 1
    assert moment > 10  # opens, renames and syncs of three files and two directories
    assert found == sorted(found)
    assert policy(training).latest() == training.checkpoints.path(16)
    assert sum(path == first for path in found) > 5


def test_killed_while_the_only_one_is_saved_again_one_is_left(training):
    only, moment = training.save(), 1
    while killed_at(training, moment):
        assert policy(training).latest() == only
        moment += 1
    assert policy(training).latest() == only


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
def test_one_process_reads_what_two_wrote(kind, two_processes, tmp_path):
    out, _ = two_processes
    assert len(list((out / kind / "images_000000000400").glob("rank*"))) == 2
    training = tiny.Training(tiny.engine_of("one_process"), tmp_path)
    training.resume(find(out / kind))
    assert training.engine.masters.step == 50
    everything = training.everything()
    assert everything is not None
    for name, tensor in safetensors.torch.load_file(out / f"{kind}.safetensors").items():
        assert torch.equal(tensor, everything[name]), name
    training.engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
def test_two_processes_go_on_where_one_stopped(kind, two_processes, reference):
    _, found = two_processes
    assert found["taken_over"][kind]["losses"] == pytest.approx(reference["losses"][-10:], rel=1e-4)
