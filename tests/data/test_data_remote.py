"""Remote shards on real servers of this host: S3 (moto's) and HTTP, sound and flaky."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ldm_scale.core import storage, traffic
from ldm_scale.core.traffic import Traffic
from ldm_scale.data import remote
from ldm_scale.data.remote import Blocks, BlockTar, RemoteReader, TarCache
from ldm_scale.data.shards import ShardSet, ShardWriter

FIELDS = ("jpg", "txt")


class Store(ThreadingHTTPServer):
    """A folder over HTTP, read only, that can misbehave.

    fault  what goes wrong with a `share` of the requests: a status, "cut" or "stall"; None where nothing does
    """

    daemon_threads = True

    def __init__(self, folder: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fault, self.share, self.ranges = Path(folder), None, 0.3, True
        self.dice = random.Random(0)
        self.asked: list[tuple[str, str, str]] = []
        self.faults = self.sent = 0
        self.slow_s = 0.0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def note(self, method: str, path: str, wanted: str) -> str | int | None:
        with self.lock:
            self.asked.append((method, path, wanted))
            bad = self.fault is not None and self.dice.random() < self.share
            self.faults += bad
            return self.fault if bad else None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Store
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        fault = self.server.note(self.command, self.path, self.headers.get("Range", ""))
        if isinstance(fault, int):
            return self.send_error(fault)
        if fault == "stall":
            time.sleep(0.7)
        time.sleep(self.server.slow_s if body else 0)
        status, data = self.find()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{self.etag}"')
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif body:
            self.server.sent += len(data)  # before the client can have it all
            self.wfile.write(data)
        return None

    def find(self) -> tuple[int, bytes]:
        path, self.etag = self.server.folder / self.path.strip("/"), "none"
        if path.is_dir():
            links = (f'<a href="{self.path.rstrip("/")}/{entry.name}">{entry.name}</a>' for entry in path.iterdir())
            return 200, "".join(links).encode()
        if not path.exists():
            return 404, b""
        data, self.etag = path.read_bytes(), f"{path.stat().st_mtime_ns:x}"
        if self.server.ranges and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            return 206, data[int(match[1]) : int(match[2]) + 1]
        return 200, data


@pytest.fixture
def store(image_shards) -> Iterator[Store]:
    server = Store(image_shards)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(storage, "_LONGEST_WAIT_S", 0.05)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3, image_shards, monkeypatch) -> str:
    """The image shards in a bucket; the environment says where and as whom, as on a cluster."""
    for name, value in {"ENDPOINT_URL": s3, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    if not files.exists("laion"):
        files.mkdir("laion")
    for name in sorted(os.listdir(image_shards)):
        files.put(f"{image_shards}/{name}", f"laion/images/{name}")
    fsspec.filesystem("s3").invalidate_cache()
    return "s3://laion/images"


def reader(kind: str, tmp_path: Path) -> RemoteReader:
    return RemoteReader(cache=TarCache(tmp_path / "cache", 1) if kind == "cache" else None)


def require_same(found: ShardSet, image_shards: str) -> None:
    """The same samples in the same order as from the disk, also when asked for at random and by several threads."""
    local = ShardSet.open(image_shards)
    assert (found.order_id, found.content_id, found.names) == (local.order_id, local.content_id, local.names)
    ids = np.random.default_rng(0).integers(0, local.n, 60)
    assert found.keys(ids) == local.keys(ids)
    assert found.read(ids, FIELDS) == local.read(ids, FIELDS)
    views = [shards.opened(1).view(512, 700).tobytes() for shards in (found, local)]
    assert views[0] == views[1]


@pytest.mark.parametrize("kind", ["blocks", "cache"])
def test_http_gives_what_the_disk_gives(store, image_shards, tmp_path, kind):
    shards = ShardSet.open(store.url, str(tmp_path / "index"), remote=reader(kind, tmp_path))
    require_same(shards, image_shards)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocks", "cache"])
def test_s3_gives_what_the_disk_gives(bucket, image_shards, tmp_path, kind):
    for source in (bucket, f"{bucket}/{{00000..00002}}.tar", f"{bucket}/*.tar"):
        shards = ShardSet.open(source, str(tmp_path / "index"), remote=reader(kind, tmp_path))
        require_same(shards, image_shards)


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "stall"])
@pytest.mark.parametrize("kind", ["blocks", "cache"])
def test_a_flaky_store_gives_the_same(store, image_shards, tmp_path, monkeypatch, kind, fault):
    monkeypatch.setattr(storage, "_ANSWER_S", 0.4)
    store.fault = fault
    shards = ShardSet.open(store.url, str(tmp_path / "index"), remote=reader(kind, tmp_path))
    require_same(shards, image_shards)
    assert store.faults > 1


@pytest.mark.parametrize(("kind", "times"), [("blocks", 2), ("cache", 1)])  # to be indexed; and to be read
def test_what_crosses_the_network_is_counted(store, image_shards, tmp_path, kind, times):
    began, store.fault, store.share = traffic.so_far(), 503, 0.5
    shards = ShardSet.open(store.url, str(tmp_path / "index"), remote=reader(kind, tmp_path))
    samples = ShardSet.open(image_shards).read(np.arange(shards.n), FIELDS)
    assert shards.read(np.arange(shards.n), FIELDS) == samples
    first = traffic.so_far().since(began)
    assert first.read == sum(len(data) for members in samples for data in members.values())
    assert first.fetched == times * sum(tar.stat().st_size for tar in store.folder.glob("*.tar"))
    assert 0 < first.retries <= store.faults, "fsspec itself asks again where a HEAD fails"
    shards.read(np.arange(shards.n), FIELDS)
    second = traffic.so_far().since(began).since(first)
    assert second == Traffic(read=first.read) and second.hits == 1


def test_a_store_that_stays_away_is_named_with_the_attempts(store, tmp_path, monkeypatch, caplog):
    shards = ShardSet.open(store.url, str(tmp_path / "index"))
    monkeypatch.setattr(storage, "_ATTEMPTS", 3)
    store.fault, store.share = 503, 1
    with pytest.raises(OSError, match=rf"{store.url}/00000\.tar: 3 attempts in .*503"):
        shards.read(np.array([0]), FIELDS)
    assert [line.split("; ")[1] for line in caplog.messages[-2:]] == [
        "attempt 2 of 3 follows",
        "attempt 3 of 3 follows",
    ]
    store.fault = None
    assert shards.read(np.array([0]), ("txt",)) == [{"txt": b"caption 0"}], "failure is not remembered"


@pytest.mark.parametrize(("status", "error"), [(403, OSError), (404, FileNotFoundError)])
def test_what_will_not_pass_is_not_tried_again(store, tmp_path, status, error):
    store.fault, store.share = status, 1
    with pytest.raises(error, match=r"00001\.tar"):
        storage.read_range(f"{store.url}/00001.tar", 0, 10)
    assert len(store.asked) == 1


def test_a_server_without_byte_ranges_is_refused(store, tmp_path):
    store.ranges = False
    with pytest.raises(ValueError, match=r"asked for 10 bytes, got \d+: the server knows no byte ranges"):
        storage.read_range(f"{store.url}/00001.tar", 0, 10)


def test_open_read_of_a_remote_file(store, monkeypatch):
    monkeypatch.setattr(storage, "PIECE", 1000)
    local = (store.folder / "00001.tar").read_bytes()
    store.fault, store.share = "cut", 0.3
    with storage.open_read(f"{store.url}/00001.tar") as file:
        assert file.read(10) == local[:10]
        assert file.read() == local[10:] and file.read() == b""
        assert file.seek(-100, io.SEEK_END) == len(local) - 100
        assert file.read(70) == local[-100:-30]
    (store.folder / "x.json").write_text(json.dumps({"a": [1]}))
    assert storage.read_json(f"{store.url}/x.json") == {"a": [1]}


def test_tars_named_in_full_are_not_asked_about(store):
    source = f"{store.url}/{{00000..00099}}.tar"
    assert len(storage.expand(source)) == 100 and not store.asked


def test_blocks_cross_the_network_once(tmp_path, store):
    data = np.random.default_rng(0).integers(0, 256, 5 * remote.BLOCK // 2, np.uint8).tobytes()
    (store.folder / "big.tar").write_bytes(data)
    blocks = Blocks(1 << 30)
    tar = BlockTar(f"{store.url}/big.tar", len(data), blocks)
    tar.announce(remote.BLOCK, 10)
    for start in (remote.BLOCK - 7, 0, 2 * remote.BLOCK, remote.BLOCK + 1, len(data) - 20):
        assert tar.read(start, 20) == data[start : start + 20]
        assert tar.view(start, 20).tobytes() == data[start : start + 20]
    assert tar.read(0, len(data)) == data and tar.read(5, 0) == b""
    assert blocks.fetched == store.sent == len(data) and len(store.asked) == 3


def test_blocks_keep_to_their_memory_and_warn_of_waste(store, caplog):
    data = bytes(4 * remote.BLOCK)
    (store.folder / "big.tar").write_bytes(data)
    blocks = Blocks(2 * remote.BLOCK)
    tar = BlockTar(f"{store.url}/big.tar", len(data), blocks)
    for _ in range(3):
        for number in range(4):
            tar.read(number * remote.BLOCK, 10)
    assert blocks.fetched == 12 * remote.BLOCK, "the least recently used go, and here that is always the next one"
    assert blocks._bytes <= 2 * remote.BLOCK
    assert sum("data.blocks_gb" in line for line in caplog.messages) == 1


def copies(folder: Path) -> set[str]:
    return {path.name for path in folder.glob(f"ldm-{'[0-9a-f]' * 40}.tar")}


def test_cache_keeps_to_its_cap_and_lets_the_least_recently_used_go(store, tmp_path):
    sizes = [(store.folder / f"0000{i}.tar").stat().st_size for i in range(3)]
    cache = TarCache(tmp_path / "cache", (sizes[1] + max(sizes)) / 1e9)
    foreign = [tmp_path / "cache" / name for name in ("00000.tar", f"{'a' * 64}.tar", "ldm-notes.tar", "x.part")]
    for file in foreign:
        file.write_bytes(bytes(10**6))
    (tmp_path / "cache" / f"ldm-{'0' * 40}.part").write_bytes(bytes(sizes[0]))
    names = []
    for number in (1, 0, 1, 2):
        before = copies(cache.folder)
        with cache.open(f"{store.url}/0000{number}.tar") as file:
            assert file.read() == (store.folder / f"0000{number}.tar").read_bytes()
        names.append((copies(cache.folder) - before, before - copies(cache.folder)))
    (one, _), (zero, _), again, (two, gone) = names
    assert again == (set(), set()) and gone == zero and copies(cache.folder) == one | two
    assert all(file.stat().st_size == 10**6 for file in foreign)
    assert {path.name for path in cache.folder.iterdir()} - {file.name for file in foreign} == (
        one | two | {"ldm-cache.lock"}
    ), "what a killed process left is cleared away"
    with pytest.raises(ValueError, match=r"00002\.tar has 0\.\d+ GB, data\.cache_gb=.*largest shard"):
        TarCache(tmp_path / "cache", 1e-6).open(f"{store.url}/00002.tar")


def test_readers_outlive_the_eviction_of_their_tars(store, image_shards, tmp_path):
    largest = max((store.folder / f"0000{i}.tar").stat().st_size for i in range(3))
    cache = TarCache(tmp_path / "cache", 1.5 * largest / 1e9)
    shards = ShardSet.open(store.url, str(tmp_path / "index"), remote=RemoteReader(cache=cache))
    for i in (0, 6, 14, 1, 7, 13, 2):
        assert shards.read(np.array([i]), ("txt",)) == [{"txt": f"caption {i}".encode()}]
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.max_bytes
    held = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists() or entry.is_symlink()]
    assert not [name for name in held if str(cache.folder) in name and name.endswith("(deleted)")]


def test_a_replaced_tar_is_another_copy_and_a_damaged_one_is_refused(store, tmp_path):
    cache, url = TarCache(tmp_path / "cache", 1), f"{store.url}/00000.tar"
    sha256 = storage.sha256_file(store.folder / "00000.tar")
    cache.open(url, sha256).close()
    data = bytearray((store.folder / "00000.tar").read_bytes())
    data[600] ^= 1
    (store.folder / "00000.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"00000\.tar has sha256 .*, its index says .*data_tools\.verify"):
        cache.open(url, sha256)
    assert len(copies(cache.folder)) == 1 and not list(cache.folder.glob("*.part"))
    with cache.open(url) as file:
        assert file.read() == data


def test_with_a_cache_an_index_is_made_of_the_only_copy(store, tmp_path):
    shards = ShardSet.open(store.url, str(tmp_path / "index"), remote=reader("cache", tmp_path))
    shards.read(np.arange(shards.n), FIELDS)
    fetched = [(path, wanted) for method, path, wanted in store.asked if method == "GET" and path.endswith(".tar")]
    assert len(fetched) == len(set(fetched)) == 3


def test_a_remote_index_is_kept_here(store, image_shards, tmp_path):
    ShardSet.open(image_shards)
    require_same(ShardSet.open(store.url, str(tmp_path / "index")), image_shards)
    indexes = [path for _, path, _ in store.asked if path.endswith(".idx")]
    require_same(ShardSet.open(store.url, str(tmp_path / "index")), image_shards)
    assert indexes and indexes == [path for _, path, _ in store.asked if path.endswith(".idx")]


OPEN = """
    import sys
    from ldm_scale.data.remote import TarCache
    cache = TarCache(sys.argv[1], float(sys.argv[2]))
    for url in sys.argv[3:]:
        print(len(cache.open(url).read()), flush=True)
"""


def start(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_of_a_host_fetch_each_tar_once(store, tmp_path):
    store.slow_s = 0.1
    tars = [store.folder / f"0000{i}.tar" for i in range(3)]
    urls = [f"{store.url}/{tar.name}" for tar in tars]
    processes = [start(OPEN, tmp_path / "cache", 1, *urls) for _ in range(3)]
    for process in processes:
        assert process.communicate()[0].split() == [str(tar.stat().st_size) for tar in tars]
    assert sorted(path for method, path, _ in store.asked if method == "GET") == [f"/{tar.name}" for tar in tars]


def test_a_killed_fetch_is_made_good(store, tmp_path):
    url, cache = f"{store.url}/00001.tar", TarCache(tmp_path / "cache", 1)
    store.slow_s = 2.0
    process = start(OPEN, cache.folder, 1, url)
    while not any(path.stat().st_size for path in cache.folder.glob("*.part")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(cache.folder.glob("*.part")) and not copies(cache.folder)
    store.slow_s = 0.0
    with cache.open(url) as file:
        assert file.read() == (store.folder / "00001.tar").read_bytes()
    assert not list(cache.folder.glob("*.part"))


@pytest.mark.slow
def test_a_bucket_that_may_only_be_read(bucket, s3, image_shards, tmp_path, monkeypatch):
    import boto3

    client = partial(boto3.client, endpoint_url=s3, region_name="us-east-1")
    iam = client("iam", aws_access_key_id="k", aws_secret_access_key="s")
    iam.create_user(UserName="reader")
    allowed = {"Effect": "Allow", "Action": "s3:GetObject", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    iam.put_user_policy(UserName="reader", PolicyName="get", PolicyDocument=policy)
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    fsspec.filesystem("s3").clear_instance_cache()
    import requests

    requests.post(f"{s3}/moto-api/reset-auth", data=b"0", timeout=10)
    try:
        with pytest.raises(PermissionError):
            fsspec.filesystem("s3").pipe("laion/images/new.tar", b"x")
        with pytest.raises(ValueError, match=r"data\.index_dir"):
            ShardSet.open(f"{bucket}/{{00000..00002}}.tar")
        shards = ShardSet.open(f"{bucket}/{{00000..00002}}.tar", str(tmp_path / "index"))
        require_same(shards, image_shards)
    finally:
        requests.post(f"{s3}/moto-api/reset-auth", data=b"1000000000", timeout=10)
        fsspec.filesystem("s3").clear_instance_cache()


READ_ONLY = """
    import os, sys
    from ldm_scale.data.shards import ShardSet
    if os.geteuid() == 0:  # whom no mode keeps out
        os.setuid(65534)
    assert not os.access(sys.argv[1], os.W_OK)
    try:
        ShardSet.open(sys.argv[1])
    except ValueError as error:
        assert "data.index_dir" in str(error), error
    shards = ShardSet.open(sys.argv[1], sys.argv[2])
    print(shards.n, *sorted(os.listdir(sys.argv[1])))
"""


def test_a_source_that_this_user_may_not_write():
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to the user that root becomes
        source, index = Path(name, "images"), Path(name, "index")
        with ShardWriter(source / "0.tar") as writer:
            writer.add("a", {"jpg": b"x", "txt": b"1"})
        index.mkdir()
        for folder, mode in ((Path(name), 0o755), (source, 0o555), (index, 0o777)):
            folder.chmod(mode)
        (source / "0.tar").chmod(0o444)
        process = start(READ_ONLY, source, index)
        assert process.communicate()[0].split() == ["1", "0.tar"] and process.returncode == 0
        source.chmod(0o755)
