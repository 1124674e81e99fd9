import tarfile
from hashlib import sha256

import pytest
import xxhash

from ldm_scale.data.index import ShardIndex, index_shard, scan
from ldm_scale.data.shards import ShardWriter

FIELDS = ("jpg", "txt", "json")


def members(count: int, fields=FIELDS) -> list[tuple[str, bytes]]:
    return [(f"{i:04d}.{field}", f"{field} {i} ".encode() * 80) for i in range(count) for field in fields]


def rejected(index: ShardIndex) -> list[tuple[str, str | None]]:
    return [(str(entry.reason), entry.key) for entry in index.header.rejected]


@pytest.fixture
def scanned(tmp_path):
    def scan_bytes(data: bytes) -> ShardIndex:
        path = tmp_path / "shard.tar"
        path.write_bytes(data)
        return scan(path)

    return scan_bytes


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_points_at_the_bytes_of_any_tar(foreign_tar, scanned, format):  # noqa: A002
    data = foreign_tar(members(5), format=format)
    index = scanned(data)
    assert index.header.n == 5 and index.header.rejected == () and index.header.combinations == {"jpg+txt+json": 5}
    assert index.header.sha256 == sha256(data).hexdigest() and index.header.tar_bytes == len(data)
    for row in range(5):
        assert index.key(row) == f"{row:04d}"
        for field in FIELDS:
            column = index.column[field]
            start, length = int(index.offsets[row, column]), int(index.lengths[row, column])
            content = data[start : start + length]
            assert content == f"{field} {row} ".encode() * 80
            assert index.xxh3[row, column] == xxhash.xxh3_64_intdigest(content)


def test_unsorted_scattered_and_unknown_members(foreign_tar, scanned):
    names = ["b.jpg", "a.jpg", "a.txt", "readme", "b.json", "b.txt", "a.exif", "._a.jpg"]
    index = scanned(foreign_tar([(name, name.encode()) for name in names], format=tarfile.PAX_FORMAT))
    assert index.keys() == ["b", "a"] and rejected(index) == []
    assert index.header.combinations == {"jpg+txt+json": 1, "jpg+txt": 1}
    assert index.header.ignored == {"readme": 1, "exif": 1, "._a.jpg": 1}


def test_rows_with(foreign_tar, scanned):
    names = ["a.jpg", "a.txt", "b.png", "c.png", "c.txt"]
    index = scanned(foreign_tar([(name, b"x") for name in names], format=tarfile.PAX_FORMAT))
    assert index.rows_with([("jpg", "png")]).tolist() == [0, 1, 2]
    assert index.rows_with([("jpg", "png"), ("txt",)]).tolist() == [0, 2]
    assert index.rows_with([("cls",)]).tolist() == []


def test_duplicates_and_orphans_are_named(foreign_tar, scanned):
    names = ["a.jpg", "a.txt", "b.txt", "b.json", "a.jpg", "a.txt", "c.jpg", "c.jpg", "c.jpg"]
    index = scanned(foreign_tar([(f, bytes([i])) for i, f in enumerate(names)], format=tarfile.PAX_FORMAT))
    assert index.keys() == ["a", "c"]
    assert sorted(rejected(index)) == [
        ("duplicate_key", "a"),
        ("duplicate_key", "c"),
        ("duplicate_key", "c"),
        ("orphan_member", "b"),
    ]
    assert index.xxh3[0, index.column["jpg"]] == xxhash.xxh3_64_intdigest(bytes([0])), "the first one counts"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_every_cut_keeps_exactly_the_whole_samples(foreign_tar, scanned, format):  # noqa: A002
    whole = foreign_tar(members(4), format=format)
    full = scanned(whole)
    ends = [int((full.offsets[row] + full.lengths[row]).max()) for row in range(4)]
    for cut in range(1, len(whole.rstrip(b"\0")), 211):
        index = scanned(whole[:cut])
        complete = sum(end <= cut for end in ends)
        if complete == 0:  # nothing says yet which members are usual
            assert rejected(index)
            continue
        assert index.keys() == [f"{i:04d}" for i in range(complete)], cut
        assert rejected(index), cut


def test_payload_cut_names_the_sample(foreign_tar, scanned):
    whole = foreign_tar(members(4), format=tarfile.USTAR_FORMAT)
    start = int(scanned(whole).offsets[2, 0])
    index = scanned(whole[: start + 10])
    assert index.keys() == ["0000", "0001"] and rejected(index) == [("truncated", "0002")]


def test_damaged_header_costs_one_sample(foreign_tar, scanned):
    whole = bytearray(foreign_tar(members(10), format=tarfile.USTAR_FORMAT))
    at = int(scanned(whole).offsets[4, 1]) - 512
    whole[at : at + 512] = bytes(512)
    index = scanned(bytes(whole))
    assert index.keys() == [f"{i:04d}" for i in range(10) if i != 4]
    assert set(rejected(index)) == {("damaged_header", None), ("incomplete_sample", "0004")}


def test_empty_tar_and_empty_file(foreign_tar, scanned):
    assert scanned(foreign_tar([], format=tarfile.PAX_FORMAT)).header.n == 0
    assert rejected(scanned(b"")) == [("no_end_blocks", None)]


def test_file_round_trip(tmp_path, foreign_tar):
    (tmp_path / "a.tar").write_bytes(foreign_tar([*members(6)[:-1], ("x.txt", b"")], format=tarfile.PAX_FORMAT))
    written = index_shard(str(tmp_path / "a.tar"), tmp_path / "deep" / "a.idx")
    read = ShardIndex.open(tmp_path / "deep" / "a.idx")
    assert read.header == written.header and read.keys() == written.keys()
    assert (read.offsets == written.offsets).all() and (read.xxh3 == written.xxh3).all()
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["a.idx"]


@pytest.mark.parametrize("keep", [0, 4, 12, 100, -1])
def test_damaged_index_is_refused_by_name(tmp_path, keep):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.add("a", {"jpg": b"x"})
    index_shard(str(tmp_path / "a.tar"), tmp_path / "a.idx")
    data = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=r"a\.idx .*"):
        ShardIndex.open(tmp_path / "a.idx")
