import hashlib
import io
import os
from pathlib import Path

import fsspec
import pytest

from ldm_scale.core import storage


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"tar")
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / ".00009.tar.123.tmp").write_bytes(b"half")
    return tmp_path


def names(files: list[str]) -> list[int]:
    return [int(Path(file).stem) for file in files]


def test_directory(shards: Path):
    assert storage.expand(str(shards)) == [str(shards / f"{i:05d}.tar") for i in range(4)]
    assert len(storage.expand(str(shards), ".json")) == 1


def test_brace_range(shards: Path):
    assert names(storage.expand(f"{shards}/{{00001..00003}}.tar")) == [1, 2, 3]


def test_two_brace_ranges(tmp_path: Path):
    for part in (8, 9, 10):
        for number in (0, 1):
            (tmp_path / f"part{part}").mkdir(exist_ok=True)
            (tmp_path / f"part{part}" / f"{number}.tar").touch()
    files = storage.expand(f"{tmp_path}/part{{8..10}}/{{0..1}}.tar")
    assert len(files) == 6
    assert storage.expand(f"{tmp_path}/part{{8..10}}") == files


def test_brace_range_with_a_missing_shard_is_refused(shards: Path):
    (shards / "00002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.tar"):
        storage.expand(f"{shards}/{{00001..00003}}.tar")


def test_brace_range_the_wrong_way_round_is_refused(shards: Path):
    with pytest.raises(FileNotFoundError, match=r"00003\.\.00001"):
        storage.expand(f"{shards}/{{00003..00001}}.tar")


def test_glob(shards: Path):
    assert names(storage.expand(f"{shards}/0000[12].tar")) == [1, 2]
    assert names(storage.expand(f"{shards}/*.tar")) == [0, 1, 2, 3]


def test_one_file_and_file_scheme(shards: Path):
    one = str(shards / "00003.tar")
    assert storage.expand(one) == storage.expand(f"file://{one}") == [one]


def test_a_name_with_glob_characters_is_itself(tmp_path: Path):
    odd = tmp_path / "set[1]"
    odd.mkdir()
    (odd / "a.tar").touch()
    assert storage.expand(str(odd)) == [str(odd / "a.tar")]
    assert storage.expand(str(odd / "a.tar")) == [str(odd / "a.tar")]


def test_list_file(shards: Path):
    listing = shards / "train.txt"
    listing.write_text(f"{shards}/00002.tar\n\n  {shards}/{{00000..00001}}.tar  \nfile://{shards}/00002.tar\n")
    assert names(storage.expand(str(listing))) == [0, 1, 2]


def test_list_file_with_a_missing_shard_is_refused(shards: Path):
    listing = shards / "train.txt"
    listing.write_text(f"{shards}/00000.tar\n{shards}/00077.tar\n")
    with pytest.raises(FileNotFoundError, match=r"00077\.tar"):
        storage.expand(str(listing))


def test_several_sources_are_joined_sorted_and_counted_once(shards: Path):
    source = f"{shards}/00003.tar::file://{shards}/00001.tar::{shards}/0000[13].tar"
    assert names(storage.expand(source)) == [1, 3]


def test_remote(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(f"/ldm_scale_bucket/laion/{number:05d}.tar", b"tar")
    memory.pipe("/ldm_scale_bucket/laion/00000_stats.json", b"{}")
    whole = [f"memory:///ldm_scale_bucket/laion/{i:05d}.tar" for i in range(3)]
    assert storage.expand("memory://ldm_scale_bucket/laion") == whole
    assert storage.expand("memory://ldm_scale_bucket/laion/") == whole
    assert storage.expand("memory://ldm_scale_bucket/laion/*.tar") == whole
    assert storage.expand("memory://ldm_scale_bucket/laion/{00000..00002}.tar") == whole
    assert storage.expand("memory://ldm_scale_bucket/laion/00001.tar") == whole[1:2]
    memory.pipe("/ldm_scale_bucket/list.txt", "\n".join(whole[:2]).encode())
    assert storage.expand("memory://ldm_scale_bucket/list.txt") == whole[:2]
    with storage.open_read(whole[0]) as file:
        assert file.read() == b"tar"


@pytest.mark.parametrize("source", ["{}/nothing", "{}/*.zip", "{}/00099.tar", "{}/00000.tar::{}/nothing", "{}/no.txt"])
def test_what_names_nothing_is_refused_by_name(shards: Path, source: str):
    with pytest.raises(FileNotFoundError, match=r"nothing|zip|00099|no\.txt"):
        storage.expand(source.replace("{}", str(shards)))


def test_an_empty_directory_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"names no \.tar file"):
        storage.expand(str(tmp_path))


def test_pipes_are_refused_wherever_they_stand(shards: Path):
    listing = shards / "train.txt"
    listing.write_text(f"{shards}/00000.tar\npipe:touch {shards}/ran\n")
    for source in ("pipe:cat x", f"{shards}::pipe:cat x", str(listing), "pipe:cat {0..3}.tar", "file://pipe:cat x"):
        with pytest.raises(ValueError, match="pipe:"):
            storage.expand(source)


def test_atomic_write_makes_folders_and_leaves_only_the_file(tmp_path: Path):
    target = tmp_path / "a" / "b" / "state.bin"
    with storage.atomic_write(target) as file:
        file.write(b"whole")
        assert not target.exists()
    assert target.read_bytes() == b"whole"
    assert os.listdir(target.parent) == ["state.bin"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, error: BaseException):
    target = tmp_path / "state.bin"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), storage.atomic_write(target) as file:
        file.write(b"half of the n")
        raise error
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.bin"]


def test_json_round_trip(tmp_path: Path):
    value = {"caption": "ein M\u00e4dchen", "n": [1, 2.5, None]}
    storage.write_json(tmp_path / "v.json", value)
    assert storage.read_json(tmp_path / "v.json") == value
    assert (tmp_path / "v.json").read_bytes().endswith(b"}\n")


def test_digest_depends_on_the_value_not_on_its_spelling():
    assert storage.digest({"a": 1, "b": [1, 2]}) == storage.digest({"b": (1, 2), "a": 1})
    assert storage.digest({"a": 1}) != storage.digest({"a": 2})
    assert storage.digest({"b": 1, "a": "x"}) == hashlib.sha256(b'{"a":"x","b":1}').hexdigest()


def test_sha256_file(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"ldm" * 10**5)
    assert storage.sha256_file(tmp_path / "x") == hashlib.sha256(b"ldm" * 10**5).hexdigest()


def test_open_read_local(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"bytes")
    for url in (f"{tmp_path}/x", f"file://{tmp_path}/x"):
        with storage.open_read(url) as file:
            assert io.BytesIO(file.read()).getvalue() == b"bytes"
