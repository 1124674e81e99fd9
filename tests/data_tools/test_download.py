"""The real img2dataset against a real web server on this machine, which misbehaves by path."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools import download
from data_tools.download_plan import reason_of
from ldm_scale.data.shards import ShardSet

PLACES = (os.environ.get("PATH", ""), str(Path(__file__).parents[2] / ".local/img2dataset/bin"))
IMG2DATASET = shutil.which("img2dataset", path=os.pathsep.join(PLACES))
needs_img2dataset = pytest.mark.skipif(IMG2DATASET is None, reason="img2dataset is not installed (.local/img2dataset)")


class Web(BaseHTTPRequestHandler):
    def do_GET(self):
        kind, _, number = self.path.strip("/").partition("/")
        self.server.asked[self.path] += 1
        if kind == "slow" or (kind == "gate" and not self.server.gate.is_set()):
            self.server.over.wait(20)
        elif kind == "missing":
            self.send_error(404)
        elif kind == "busy" and self.server.busy:
            self.send_error(503)
        elif kind == "html":
            self.answer(b"<html>no image</html>")
        elif kind == "cut":
            self.answer(picture(0), length=10**6)
        else:
            size = {"wide": (90, 30), "small": (16, 12)}.get(kind, (60, 50))
            self.answer(picture(int(number), size), {"X-Robots-Tag": "noai"} if kind == "private" else {})

    def answer(self, data, headers=(), length=None):
        self.send_response(200)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def picture(number, size=(60, 50)):
    pixels = np.random.default_rng(number).integers(0, 200, (size[1] // 2, size[0] // 2, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "jpeg", quality=90)
    return file.getvalue()


@pytest.fixture
def web(monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Web)
    server.daemon_threads = True
    server.asked, server.busy = Counter(), True
    server.gate, server.over = threading.Event(), threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def metadata(path, urls, **columns):
    rows = {"URL": urls, "TEXT": [f"caption of {url}" for url in urls], "WIDTH": [60] * len(urls)} | columns
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


def run(source, out, *more):
    arguments = ["--processes", "1", "--threads", "8", "--timeout", "1", "--retries", "0", "--size", "32"]
    return download.main([str(source), str(out), *arguments, *map(str, more)])


def report(out):
    return json.loads((out / ".download/report.json").read_text())


def samples(out):
    """Url -> the parsed json and the image, of every sample of every shard."""
    found = {}
    for tar in sorted(out.glob("*.tar")):
        with tarfile.open(tar) as archive:
            held = {member.name: archive.extractfile(member).read() for member in archive}
        for name in held:
            if name.endswith(".json"):
                facts = json.loads(held[name])
                image = next(held[name[:-5] + end] for end in (".jpg", ".png", ".webp") if name[:-5] + end in held)
                found[facts["url"]] = (facts, Image.open(io.BytesIO(image)), held.get(name[:-5] + ".txt"))
    return found


@needs_img2dataset
@pytest.mark.slow
def test_every_outcome_is_counted_and_what_may_pass_is_tried_again(tmp_path, web, capsys, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(IMG2DATASET).parent}{os.pathsep}{os.environ['PATH']}")
    kinds = ("good/1", "good/2", "missing/3", "html/4", "private/5", "slow/6", "busy/7", "busy/8", "cut/9", "small/10")
    urls = [f"{web.url}/{kind}" for kind in kinds] + ["http://127.0.0.1:9/nobody", f"{web.url}/good/99", None]
    source = metadata(tmp_path / "in/part.parquet", urls, similarity=[0.1 * i for i in range(13)])
    removed = tmp_path / "removed.txt"
    removed.write_text(f"{web.url}/good/99\n")
    arguments = ("--removal-list", removed, "--shard-size", "4", "--min-side", "20")
    assert run(source.parent, tmp_path / "out", *arguments) == 0
    first = report(tmp_path / "out")
    assert first["asked"] == 11 and first["downloaded"] == 2 and first["pending"] == 0
    assert first["left_out"] == {"missing_url": 1, "removal_list": 1}
    assert first["failed"] == {
        "http_404": 1, "no_image": 1, "disallowed": 1, "timeout": 1, "http_503": 2, "connection": 2, "too_small": 1
    }  # fmt: skip
    assert first["worth_another_try"] == 5
    assert "downloaded 2 (18.2%)" in capsys.readouterr().out
    assert web.asked["/good/99"] == 0
    found = samples(tmp_path / "out")
    facts, image, caption = found[f"{web.url}/good/2"]
    assert image.size == (32, 32) and caption.decode() == f"caption of {web.url}/good/2"
    assert facts["similarity"] == 0.1 and facts["original_width"] == 60 and "WIDTH" not in facts

    web.busy = False
    assert run(source.parent, tmp_path / "out", *arguments, "--retry-failed") == 0
    second = report(tmp_path / "out")
    assert second["asked"] == 11 and second["downloaded"] == 4 and second["rounds"] == 2
    assert sum(second["failed"].values()) == 7 and "http_503" not in second["failed"]
    assert web.asked["/good/1"] == web.asked["/missing/3"] == 1 and web.asked["/slow/6"] == 2
    assert samples(tmp_path / "out").keys() == {f"{web.url}/{k}" for k in ("good/1", "good/2", "busy/7", "busy/8")}
    shards = ShardSet.open(str(tmp_path / "out"))
    assert shards.n == 4 and len(set(shards.keys(np.arange(4)))) == 4

    (tmp_path / "removed.txt").write_text(f"{web.url}/good/98\n")
    assert run(source.parent, tmp_path / "out", *arguments) == 2
    assert "removal_list_sha256" in capsys.readouterr().err


@needs_img2dataset
@pytest.mark.slow
def test_killed_it_goes_on_with_whole_shards_only(tmp_path, web, capsys):
    urls = [f"{web.url}/{'good' if i < 8 else 'gate'}/{i}" for i in range(16)]
    source = metadata(tmp_path / "in/part.parquet", urls)
    out = tmp_path / "out"
    arguments = [str(source), str(out), "--img2dataset", IMG2DATASET, "--shard-size", "4", "--processes", "1"]
    arguments += ["--timeout", "15", "--size", "32", "--format", "webp"]
    command = [sys.executable, "-m", "data_tools.download", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "00002.tar").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert download.main(arguments) == 2  # img2dataset outlived its starter
    assert "another download writes" in capsys.readouterr().err
    for child in children_holding(out / ".download/lock"):
        os.killpg(child, signal.SIGKILL)
    (out / "00001_stats.json").write_text('{"count": 4, "succ')  # as a full disk leaves it
    before = (out / "00000.tar").read_bytes()
    assert (out / "00002.tar").exists() and not (out / "00002_stats.json").exists()
    web.gate.set()
    assert download.main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 shards were cut short" in said and "shards: 4 of 4" in said
    assert samples(out).keys() == set(urls)
    assert (out / "00000.tar").read_bytes() == before and web.asked["/good/0"] == 1 and web.asked["/good/4"] == 2
    assert all(image.format == "WEBP" for _, image, _ in samples(out).values())


def children_holding(lock):
    """Process ids, other than ours, that have a file open."""
    found = set()
    for process in Path("/proc").iterdir():
        try:
            held = [os.readlink(link) for link in (process / "fd").iterdir()]
        except (OSError, NotADirectoryError):
            continue
        if str(lock) in held and process.name != str(os.getpid()):
            found.add(os.getpgid(int(process.name)))
    return found


@needs_img2dataset
@pytest.mark.slow
def test_a_hang_is_ended_and_says_so(tmp_path, web, capsys):
    source = metadata(tmp_path / "in/part.parquet", [f"{web.url}/slow/1"])
    more = ("--img2dataset", IMG2DATASET, "--timeout", "60", "--stall-minutes", "0.05")
    started = time.monotonic()
    assert run(source, tmp_path / "out", *more) == 1
    assert time.monotonic() - started < 30
    assert "was ended" in capsys.readouterr().out
    assert report(tmp_path / "out")["pending"] == 1
    assert not list((tmp_path / "out").glob("0*"))
    assert not children_holding(tmp_path / "out/.download/lock")


@needs_img2dataset
@pytest.mark.slow
def test_sizes_keep_their_ratio_and_nothing_has_white_bars(tmp_path, web):
    source = metadata(tmp_path / "in/part.parquet", [f"{web.url}/wide/1", f"{web.url}/small/2", f"{web.url}/good/3"])
    more = ("--img2dataset", IMG2DATASET, "--resize", "keep_ratio", "--keep-small", "--max-aspect", "3.5")
    assert run(source, tmp_path / "out", *more, "--format", "png") == 0
    found = {url.split("/")[-2]: image for url, (_, image, _) in samples(tmp_path / "out").items()}
    assert {kind: image.size for kind, image in found.items()} == {
        "wide": (90, 30),
        "small": (16, 12),
        "good": (38, 32),
    }
    assert max(np.asarray(image).max() for image in found.values()) < 245


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resize", "border"], "white bars"),
        (["--quality", "0"], "--quality 0"),
        (["--format", "png", "--quality", "95"], "must be 0 to 9"),
        (["--timeout", "0"], "--timeout 0"),
        (["--img2dataset", "/no/such/program"], "pip install img2dataset"),
        (["--max-aspect", "0.5"], "--max-aspect"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(tmp_path, capsys, arguments, said):
    source = metadata(tmp_path / "in/part.parquet", ["http://127.0.0.1:9/x"])
    try:
        code = download.main([str(source), str(tmp_path / "out"), *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert download.main([str(source), "s3://bucket/out"]) == 2


def test_an_environment_without_imghdr_is_explained(tmp_path, capsys):
    program = tmp_path / "img2dataset"
    program.write_text(f"#!{sys.executable}\nraise ModuleNotFoundError(\"No module named 'imghdr'\")\n")
    program.chmod(0o755)
    source = metadata(tmp_path / "in/part.parquet", ["http://127.0.0.1:9/x"])
    assert download.main([str(source), str(tmp_path / "out"), "--img2dataset", str(program)]) == 2
    assert "Python 3.13" in capsys.readouterr().err
    program.write_text(f"#!{sys.executable}\nraise SystemExit('cv2 is broken')\n")
    assert download.main([str(source), str(tmp_path / "out"), "--img2dataset", str(program)]) == 2
    assert "cv2 is broken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", "http_404"),
        ("<urlopen error [Errno -2] Name or service not known>", "name_not_found"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "name_not_found"),
        ("<urlopen error timed out>", "timeout"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "ssl"),
        ("IncompleteRead(10 bytes read, 5 more expected)", "connection"),
        ("Use of image disallowed by X-Robots-Tag directive", "disallowed"),
        ("unknown url type: 'nonsense'", "bad_url"),
        ("Image decoding error", "no_image"),
        (None, "other"),
    ],
)
def test_reasons(message, reason):
    assert reason_of(message) == reason
