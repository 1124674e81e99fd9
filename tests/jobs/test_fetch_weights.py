import hashlib
import json
import random
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldm_scale.evaluation.features import INCEPTION_FILE
from ldm_scale.jobs.fetch_weights import WEIGHTS, Published, fetch

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT under every path but /absent.

    limit    bytes after which it hangs up, though it promised all; None for never
    refusals requests that it answers with 503 first
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.limit, self.refusals, self.ranges = CONTENT, None, 0, True
        self.sent: list[int] = []

    def file(self, name: str, sha256: str | None = None) -> Published:
        return Published(file=name, url=f"http://127.0.0.1:{self.server_port}/{name}", licence="MIT", sha256=sha256)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        if self.path == "/absent":
            return self.send_error(404)
        if self.server.refusals:
            self.server.refusals -= 1
            return self.send_error(503)
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) if self.server.ranges else None
        body = self.server.content[int(match[1]) :] if match else self.server.content
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.sent.append(len(body[: self.server.limit]))
        return self.wfile.write(body[: self.server.limit])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_a_fetch_that_breaks_off_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.limit, server.refusals = 70_000, 1
    fetch([server.file("a/model.bin", SHA256[:8])], tmp_path)
    assert (tmp_path / "a/model.bin").read_bytes() == CONTENT
    assert len(server.sent) == 5 and sum(server.sent) < len(CONTENT) + 5  # nothing came twice
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model.bin"]
    entry = json.loads((tmp_path / "manifest.json").read_text())["a/model.bin"]
    assert entry == {
        "url": server.file("a/model.bin").url, "licence": "MIT", "bytes": len(CONTENT), "sha256": SHA256
    }  # fmt: skip


def test_a_process_that_was_killed_left_its_part_to_the_next(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.bin.part").write_bytes(CONTENT[:200_000])
    fetch([server.file("model.bin")], tmp_path)
    (tmp_path / "whole.bin.part").write_bytes(CONTENT)
    fetch([server.file("whole.bin")], tmp_path)
    assert server.sent == [100_001, 1]
    assert (tmp_path / "model.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes() == CONTENT


def test_what_is_there_is_verified_and_fetched_again_only_where_it_is_damaged(server: Server, tmp_path: Path) -> None:
    file = server.file("model.bin")
    fetch([file], tmp_path)
    fetch([file], tmp_path)
    assert len(server.sent) == 1
    (tmp_path / "model.bin").write_bytes(CONTENT[:-1] + b"?")
    fetch([file], tmp_path)
    assert len(server.sent) == 2 and (tmp_path / "model.bin").read_bytes() == CONTENT


def test_a_server_without_ranges_is_asked_for_all_of_it(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "model.bin.part").write_bytes(CONTENT[:200_000])
    fetch([server.file("model.bin", SHA256)], tmp_path)
    assert (tmp_path / "model.bin").read_bytes() == CONTENT


def test_other_bytes_than_those_published_or_first_seen_are_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"/known.bin gave a file of sha256 {SHA256}, not 00aa"):
        fetch([server.file("known.bin", "00aa")], tmp_path)
    fetch([server.file("model.bin")], tmp_path)
    (tmp_path / "model.bin").unlink()
    server.content = CONTENT[::-1]
    with pytest.raises(ValueError, match=f"not {SHA256}; it is not kept"):
        fetch([server.file("model.bin")], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json"]


def test_what_a_server_does_not_have_is_named_at_once(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"http://127.*/absent: HTTP Error 404"):
        fetch([server.file("absent")], tmp_path)


def test_the_list_names_each_file_once_with_source_and_licence() -> None:
    listed = [one for files in WEIGHTS.values() for one in files]
    assert len({one.file for one in listed}) == len(listed)
    assert all(one.url.startswith("https://") and one.licence for one in listed)
    digests = {one.file: one.sha256 for one in listed if one.sha256}
    assert INCEPTION_FILE.removesuffix(".pth").endswith(digests[INCEPTION_FILE][:8])
