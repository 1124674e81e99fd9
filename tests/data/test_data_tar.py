import errno
import io
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from ldm_scale.data import tar
from ldm_scale.data.tar import Damage, Fault, Member, ShardWriter, split_name, walk


def write(path: Path, count: int = 4, comment: str | None = None) -> Path:
    with ShardWriter(path, comment=comment) as writer:
        for i in range(count):
            writer.add(f"{i:04d}", {"jpg": bytes([i + 1]) * (500 + 12 * i), "txt": f"caption {i}".encode()})
    return path


def test_tarfile_webdataset_and_gnu_tar_read_what_we_write(tmp_path):
    path = write(tmp_path / "a.tar", comment='{"n": 1}')
    with tarfile.open(path) as archive:
        entries = archive.getmembers()
        assert archive.pax_headers == {"comment": '{"n": 1}'}
        assert [entry.name for entry in entries[:2]] == ["0000.jpg", "0000.txt"]
        assert {(entry.mtime, entry.uid, entry.mode) for entry in entries} == {(0, 0, 0o644)}
        content = archive.extractfile("0001.txt")
        assert content is not None and content.read() == b"caption 1"
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == ["0000", "0001", "0002", "0003"]
    assert read[3]["jpg"] == bytes([4]) * 536
    listed = subprocess.run(["tar", "tf", str(path)], capture_output=True, text=True, check=True)
    assert listed.stderr == "" and len(listed.stdout.split()) == 8


def test_equal_content_gives_equal_bytes(tmp_path):
    assert write(tmp_path / "a.tar").read_bytes() == write(tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("length", [*range(80, 125), 960, 985, 990, 995, 1000])
def test_comment_of_any_length_reads_back(tmp_path, length):
    path = write(tmp_path / "a.tar", count=1, comment="x" * length)
    with tarfile.open(path) as archive:
        assert archive.pax_headers == {"comment": "x" * length}
    assert tar.comment(memoryview(path.read_bytes())) == "x" * length


def test_shard_without_comment_has_none(tmp_path):
    assert tar.comment(memoryview(write(tmp_path / "a.tar").read_bytes())) is None


@pytest.mark.parametrize(
    "key, field, message",
    [
        ("a.b", "txt", "does not split"),
        ("", "txt", "does not split"),
        ("a", "TXT", "does not split"),
        ("a", "", "does not split"),
        ("/a", "txt", "does not split"),
        ("../a", "txt", "does not split"),
        ("k" * 97, "txt", "at most 100"),
        ("\u00e9" * 49, "txt", "at most 100"),
        ("0000", "txt", "given twice"),
    ],
)
def test_names_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path, key, field, message):
    with pytest.raises(ValueError, match=message), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("0000", {"txt": b""})
        writer.add(key, {field: b""})
    assert list(tmp_path.iterdir()) == []


def test_longest_name_fits(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("k" * 96, {"txt": b"caption"})
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == ["k" * 96 + ".txt"]


def test_full_disk_is_said_clearly_and_leaves_the_old_shard(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tar.os, "fsync", full)
    with pytest.raises(OSError, match=r"a\.tar: No space left.*free space") as raised:
        write(path, count=9)
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_really_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "with_name", lambda self, name: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok: None)
    with pytest.raises(OSError, match="cannot write shard"):
        write(tmp_path / "a.tar", count=250)


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("0", {"txt": b""})
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, expected",
    [
        ("a.jpg", ("a", "jpg")),
        ("dir.x/a.seg.PNG", ("dir.x/a", "seg.png")),
        ("./a.txt", ("a", "txt")),
        ("a", None),
        ("dir/.hidden", None),
        ("._a.jpg", None),
    ],
)
def test_names_split_at_the_first_dot_of_the_base_name(name, expected):
    assert split_name(name) == expected


name_strategy = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF), min_size=1, max_size=150).map(
    lambda text: text.strip("/").replace("//", "/") or "x"
)


@given(
    st.lists(st.tuples(name_strategy, st.binary(max_size=1500)), max_size=8),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
    st.sampled_from([0, 1.5]),
)
def test_walk_agrees_with_tarfile(members, format, mtime):  # noqa: A002
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mtime = len(data), mtime
            archive.addfile(entry, io.BytesIO(data))
    data = file.getvalue()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [Member(entry.name, entry.offset_data, entry.size) for entry in archive]
    assert list(walk(memoryview(data))) == expected


def test_walk_reads_ustar_prefixes_directories_and_base_256(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("d" * 60)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        entry = tarfile.TarInfo("d" * 60 + "/" + "n" * 60 + ".txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    data = bytearray(file.getvalue())
    assert list(walk(memoryview(data))) == [Member("d" * 60 + "/" + "n" * 60 + ".txt", 1024, 5)]
    data[512 + 124 : 512 + 136] = b"\x80" + (5).to_bytes(11)
    _sign(data, 512)
    assert list(walk(memoryview(data))) == [Member("d" * 60 + "/" + "n" * 60 + ".txt", 1024, 5)]


def test_links_and_sparse_files_are_named():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "b.jpg"
        archive.addfile(link)
    assert list(walk(memoryview(file.getvalue()))) == [Damage(Fault.UNSUPPORTED, 0, "a.jpg")]


def _sign(data: bytearray, at: int) -> None:
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def _names(found):
    return [item.name for item in found if isinstance(item, Member)]


def _damage(found):
    return [(item.fault, item.offset, item.name) for item in found if isinstance(item, Damage)]


# Each sample of `write` takes 1,024 or 1,536 bytes of jpg and 1,024 of txt; offsets below are headers of these.
def headers(data: bytes) -> dict[str, int]:
    return {item.name: item.offset - 512 for item in walk(memoryview(data)) if isinstance(item, Member)}


@pytest.fixture
def data(tmp_path) -> bytearray:
    return bytearray(write(tmp_path / "a.tar").read_bytes())


def test_cut_between_members(data):
    at = headers(data)["0002.txt"]
    found = list(walk(memoryview(data[:at])))
    assert _names(found)[-1] == "0002.jpg" and _damage(found) == [(Fault.NO_END, at, None)]


def test_cut_inside_a_member(data):
    at = headers(data)["0002.jpg"]
    found = list(walk(memoryview(data[: at + 700])))
    assert _names(found)[-1] == "0001.txt" and _damage(found) == [(Fault.TRUNCATED, at, "0002.jpg")]


def test_cut_inside_a_header(data):
    at = headers(data)["0002.jpg"]
    found = list(walk(memoryview(data[: at + 100])))
    assert _names(found)[-1] == "0001.txt" and _damage(found) == [(Fault.TRUNCATED, at, None)]


def test_cut_between_the_end_blocks(data):
    at = len(bytes(data).rstrip(b"\0"))
    at = -(-at // 512) * 512
    found = list(walk(memoryview(data[: at + 512])))
    assert len(_names(found)) == 8 and _damage(found) == [(Fault.NO_END, at, None)]


def test_zeroed_header_loses_only_its_member(data):
    at = headers(data)["0001.jpg"]
    data[at : at + 512] = bytes(512)
    found = list(walk(memoryview(data)))
    assert len(_names(found)) == 7 and "0001.jpg" not in _names(found)
    assert _damage(found) == [(Fault.DAMAGED_HEADER, at, None)]


def test_flipped_bit_in_a_header(data):
    at = headers(data)["0001.jpg"]
    data[at + 2] ^= 1
    found = list(walk(memoryview(data)))
    assert len(_names(found)) == 7 and _damage(found) == [(Fault.DAMAGED_HEADER, at, None)]


@pytest.mark.parametrize("size", [b"00000100000", b"00001000000", b"77777777777"])
def test_size_that_leads_beyond_the_end(data, size):
    at = headers(data)["0001.jpg"]
    data[at + 124 : at + 135] = size
    _sign(data, at)
    found = list(walk(memoryview(data)))
    assert _names(found) == ["0000.jpg", "0000.txt", *[f"000{i}.{f}" for i in (1, 2, 3) for f in ("jpg", "txt")][1:]]
    assert _damage(found) == [(Fault.DAMAGED_SIZE, at, "0001.jpg")]


def test_size_that_leads_into_the_content_takes_the_member_back(data):
    """0003.jpg has 536 bytes; told it has 10, the walk would find content where a header should be."""
    at = headers(data)["0003.jpg"]
    data[at + 124 : at + 135] = b"00000000012"
    _sign(data, at)
    found = list(walk(memoryview(data)))
    assert _damage(found) == [(Fault.DAMAGED_SIZE, at + 1024, "0003.jpg")]
    assert _names(found)[-1] == "0003.txt"


def test_two_archives_in_one_file(tmp_path, data):
    found = list(walk(memoryview(bytes(data) * 2)))
    assert len(_names(found)) == 16 and [fault for fault, _, _ in _damage(found)] == [Fault.DAMAGED_HEADER]


def test_end_that_was_never_written(data):
    assert _damage(walk(memoryview(bytes(data) + bytes(2 << 20))))[0][0] is Fault.TRUNCATED


def test_empty_archive_is_sound_and_empty_file_is_not(tmp_path):
    assert list(walk(memoryview(write(tmp_path / "a.tar", count=0).read_bytes()))) == []
    assert _damage(walk(memoryview(b""))) == [(Fault.NO_END, 0, None)]


@given(st.data())
def test_no_damage_is_silent_and_none_raises(draw):
    """Cut anywhere before the end blocks, or zero any block of a header: something is reported."""
    whole = _pax_archive()
    end = -(-len(whole.rstrip(b"\0")) // 512) * 512
    assert _damage(walk(memoryview(whole[: draw.draw(st.integers(0, end))])))
    at = draw.draw(st.sampled_from(list(headers(whole).values())))
    assert _damage(walk(memoryview(whole[:at] + bytes(512) + whole[at + 512 :])))


@given(st.integers(0, 10_239), st.integers(0, 255))
def test_any_changed_byte_is_survived(at, value):
    whole = bytearray(_pax_archive())
    whole[at] = value
    list(walk(memoryview(whole)))


def _pax_archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for i in range(5):
            entry = tarfile.TarInfo(f"{i}.txt")
            entry.size, entry.mtime = 700, 0.5
            archive.addfile(entry, io.BytesIO(bytes([65 + i]) * 700))
    return file.getvalue()
