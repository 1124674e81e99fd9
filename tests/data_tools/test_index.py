import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from data_tools.index import energon_index, main
from ldm_scale.data.index import ShardIndex
from ldm_scale.data.shards import ShardSet, ShardWriter

ROOT = Path(__file__).parents[2]


def write(folder: Path, counts: list[int], size: int = 100) -> str:
    for shard, count in enumerate(counts):
        with ShardWriter(folder / f"{shard:05d}.tar") as writer:
            for i in range(count):
                writer.add(f"{shard:05d}_{i:05d}", {"jpg": bytes([i % 256]) * (size + i), "txt": b"words"})
    return str(folder)


def indexes(folder: Path) -> list[Path]:
    return sorted((folder / ".ldm").glob("*.idx"))


def test_makes_what_opening_the_set_would_make(tmp_path, capsys):
    one, other = write(tmp_path / "one", [5, 7, 3]), write(tmp_path / "other", [5, 7, 3])
    assert main([one, "-j", "1", "--report", str(tmp_path / "report.json")]) == 0
    opened = ShardSet.open(other)
    for made, wanted in zip(indexes(tmp_path / "one"), indexes(tmp_path / "other"), strict=True):
        assert made.read_bytes() == wanted.read_bytes()
    manifests = [(tmp_path / name / ".ldm/manifest.json").read_text() for name in ("one", "other")]
    assert manifests[0] == manifests[1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["order_id"] == opened.order_id and report["content_id"] == opened.content_id
    assert (report["shards"], report["samples"], report["built"], report["damaged"]) == (3, 15, 3, {})
    said = capsys.readouterr().out
    assert f"15 samples in 3 shards, {report['bytes'] / 1e9:.3f} GB; 3 indexes made now" in said
    assert f"indexes and manifest in {one}/.ldm" in said and f"data.images={one}\n" in said


@pytest.mark.slow
def test_several_processes_make_the_same_indexes(tmp_path):
    one, other = write(tmp_path / "one", [5, 7, 3, 40]), write(tmp_path / "other", [5, 7, 3, 40])
    assert main([one, "-j", "1"]) == main([other, "-j", "3"]) == 0
    for made, wanted in zip(indexes(tmp_path / "one"), indexes(tmp_path / "other"), strict=True):
        assert made.read_bytes() == wanted.read_bytes()


def test_only_what_is_missing_is_made(tmp_path):
    source = write(tmp_path / "in", [5, 7, 3])
    assert main([source, "-j", "1"]) == 0
    first, second, third = indexes(tmp_path / "in")
    kept = [path.stat().st_mtime_ns for path in (first, third)]
    second.unlink()
    assert main([source, "-j", "1", "--report", str(tmp_path / "report.json")]) == 0
    assert second.exists() and [path.stat().st_mtime_ns for path in (first, third)] == kept
    assert json.loads((tmp_path / "report.json").read_text())["built"] == 1


def test_damaged_shards_are_named_and_the_rest_is_there(tmp_path, capsys):
    source = write(tmp_path / "in", [5, 7, 3])
    tar = tmp_path / "in/00001.tar"
    os.truncate(tar, 6 * 2048 + 600)  # inside the image of the last sample
    assert main([source, "-j", "1", "--report", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["damaged"]) == ["00001.tar"] and "truncated" in report["damaged"]["00001.tar"]
    assert report["samples"] == ShardSet.open(source).n == 14
    said = capsys.readouterr().out
    assert "1 damaged shards" in said and "00001.tar: truncated" in said
    write(tmp_path / "in", [5, 7, 3])
    assert main([source, "-j", "1"]) == 0


def test_what_is_merely_odd_is_counted_and_is_no_damage(tmp_path, capsys):
    source = write(tmp_path / "in", [4])
    with ShardWriter(tmp_path / "in/00001.tar") as writer:
        writer.add("a", {"jpg": b"x", "txt": b"words"})
        writer.add("b", {"txt": b"words"})
    assert main([source, "-j", "1"]) == 0
    assert "rejected 1 orphan_member" in capsys.readouterr().out


def test_unreadable_shards_are_told_and_leave_no_manifest(tmp_path, capsys):
    source = write(tmp_path / "in", [5])
    (tmp_path / "in/00001.tar").mkdir()
    assert main([source, "-j", "1", "--report", str(tmp_path / "report.json")]) == 1
    assert not (tmp_path / "in/.ldm/manifest.json").exists()
    assert "1 shards could not be read" in capsys.readouterr().out
    assert "00001.tar" in json.loads((tmp_path / "report.json").read_text())["unreadable"][0]


def test_read_only_sources_are_indexed_elsewhere_or_refused(tmp_path, capsys):
    source = write(tmp_path / "in", [5])
    (tmp_path / "in/.ldm").write_text("a file where the folder would be")
    assert main([source, "-j", "1"]) == 2
    assert "data.index_dir" in capsys.readouterr().err
    assert main([source, "-j", "1", "--index-dir", str(tmp_path / "index")]) == 0
    assert f"data.index_dir={tmp_path / 'index'}" in capsys.readouterr().out
    assert list((tmp_path / "index").rglob("*.idx")) and ShardSet.open(source, str(tmp_path / "index")).n == 5


def test_mistakes_are_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "no such folder")]) == 2
    assert main([write(tmp_path / "in", [1]), "-j", "0"]) == 2
    assert main(["memory://bucket/0.tar", "--energon"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("error: ") for line in said)


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("kind", FORMATS)
def test_energon_finds_every_sample_by_its_index(tmp_path, kind):
    """Against Python's tarfile: the offset of the first header of each sample, then where the last member ends."""
    long = "k" * 120 if kind != "ustar" else "k"
    samples = [(f"{long}{i}", {"jpg": bytes(700 * i), "txt": b"words", "extra.bin": b"e"}) for i in range(4)]
    with tarfile.open(tmp_path / "00000.tar", "w", format=FORMATS[kind]) as archive:
        for key, fields in samples:
            for field, data in fields.items():
                entry = tarfile.TarInfo(f"{key}.{field}")
                entry.size, entry.mtime = len(data), 1.5
                archive.addfile(entry, io.BytesIO(data))
    assert main([str(tmp_path), "-j", "1", "--energon"]) == 0
    content = energon_index(tmp_path / "00000.tar").read_bytes()
    offsets = struct.unpack(f"<{len(content) // 8}Q", content)
    with tarfile.open(tmp_path / "00000.tar") as archive:
        wanted = [member.offset for member in archive if member.name.endswith(".jpg")]
        assert list(offsets) == [*wanted, archive.offset]
    tar = (tmp_path / "00000.tar").read_bytes()
    for (key, fields), begin, end in zip(samples, offsets[:-1], offsets[1:], strict=True):
        with tarfile.open(fileobj=io.BytesIO(tar[begin:end])) as archive:
            assert {m.name: archive.extractfile(m).read() for m in archive} == {
                f"{key}.{field}": data for field, data in fields.items()
            }


def test_energon_indexes_come_later_too(tmp_path):
    source = write(tmp_path / "in", [3, 2])
    assert main([source, "-j", "1"]) == 0
    assert not list((tmp_path / "in").glob("*.tar.idx"))
    assert main([source, "-j", "1", "--energon"]) == 0
    assert [path.stat().st_size for path in sorted((tmp_path / "in").glob("*.tar.idx"))] == [8 * 4, 8 * 3]
    assert ShardSet.open(source).n == 5


def wait_for_the_end_of_group(group: int, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(group, signal.SIGKILL)
    pytest.fail(f"workers outlived their parent by {seconds} s")


@pytest.mark.slow
def test_killed_at_work_it_goes_on_where_it_stopped(tmp_path):
    """SIGKILL while some indexes are there: workers end too, and the next run makes exactly the rest."""
    total = 400
    source = write(tmp_path / "in", [300])
    for shard in range(1, total):
        os.link(tmp_path / "in/00000.tar", tmp_path / f"in/{shard:05d}.tar")
    command = [sys.executable, "-m", "data_tools.index", source, "-j", "2"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet, start_new_session=True)
    while not indexes(tmp_path / "in"):
        assert process.poll() is None, "ended without an index"
        time.sleep(0.005)
    process.kill()
    process.wait()
    wait_for_the_end_of_group(process.pid)
    made = indexes(tmp_path / "in")
    assert 0 < len(made) < total and not (tmp_path / "in/.ldm/manifest.json").exists()
    assert {ShardIndex.open(path).header.n for path in made} == {300}
    before = {path: path.stat().st_mtime_ns for path in made}
    report = tmp_path / "report.json"
    subprocess.run([*command, "--report", str(report)], cwd=ROOT, check=True, capture_output=True)
    assert json.loads(report.read_text())["built"] == total - len(made)
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert ShardSet.open(source).n == total * 300
