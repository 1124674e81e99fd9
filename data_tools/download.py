"""Images of LAION-style metadata, fetched by img2dataset into shards: a thin wrapper that makes it fit for training.

What img2dataset leaves to its user is decided or checked here: no white bars, column names of any release, a removal
list honoured before anything is fetched, shards that are whole, failed shards reported, failed rows tried again on
request, a hang ended. It runs as a program in an environment of its own, since it needs webdataset<0.3.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.command_line import run_tool, say
from data_tools.download_plan import Fetched, Plan, Recipe, prepare
from data_tools.filter import removal_list
from ldm_scale.core import progress, storage

_RESIZES = ("center_crop", "keep_ratio", "keep_ratio_largest", "no")
_QUALITY = {"jpg": 95, "webp": 95, "png": 6}
_POLL_SECONDS = 1.0
_LAST_WORDS = 8  # lines of img2dataset's log that are shown where it failed
_OWN_PLACE = ".local/img2dataset"
_INSTALL = f"python3 -m venv {_OWN_PLACE} && {_OWN_PLACE}/bin/pip install img2dataset"
_QUIET = {"NO_ALBUMENTATIONS_UPDATE": "1"}  # it asks its server for news otherwise

_EXAMPLES = f"""\
examples:
  python -m data_tools.download filtered data/laion
      every .parquet in filtered/ -> data/laion/00000.tar, ...: center-cropped to 256 pixels, JPEG of quality 95
  python -m data_tools.download 'laion/part-{{00000..00127}}.parquet' /scratch/laion --size 512 --resize keep_ratio \\
      --min-side 512 --max-aspect 2 --processes 16 --threads 64 --removal-list removed.txt
  python -m data_tools.download filtered data/laion --retry-failed
      finish, then ask again for what failed and may not fail again; what comes goes into further shards

Run the same command again after a stop: whole shards are kept, shards cut short are fetched again. The removal list
names URLs, keys or hashes, one a line, or is a .jsonl; its rows are never asked for. Columns of text, numbers and truth
values are kept in lower case; url and caption are found by any usual name (python -m data_tools.filter --help).

img2dataset is not part of this environment: it needs webdataset<0.3. Once:
  {_INSTALL}
It imports imghdr, which Python 3.13 no longer has: use Python 3.12 or older there, or also install standard-imghdr.
It honours X-Robots-Tag noai and noindex; it does not turn images by their EXIF orientation. Many name_not_found or
timeout failures mean that the name server is too slow: run a caching one on this machine, or use fewer --threads.

In OUT/.download: report.json (unless --report says where), plan.json, img2dataset.log. Exit code: 1 where shards are
missing or nothing came, 2 for a mistake.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How hard to try; may differ between runs of one download."""

    processes: int
    threads: int
    timeout: int
    """Seconds without an answer after which a URL has failed."""
    retries: int
    """Times that a failed URL is asked for again at once."""
    stall_minutes: float
    """Time without any progress after which img2dataset is ended."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("processes", self.processes, 1),
            ("threads", self.threads, 1),
            ("timeout", self.timeout, 1),
            ("retries", self.retries, 0),
        ):
            if value < least:
                raise ValueError(f"--{name} {value}; must be at least {least}")
        if self.stall_minutes <= 0:
            raise ValueError(f"--stall-minutes {self.stall_minutes}; must be more than 0")


def find_img2dataset(given: str | None) -> str:
    """The program, after a start that shows it can work.

    raises  ValueError saying how to install it
    """
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", ""), f"{_OWN_PLACE}/bin")
    found = shutil.which(given or "img2dataset", path=None if given else os.pathsep.join(places))
    if found is None:
        raise ValueError(f"there is no {given or 'img2dataset'}; it needs an environment of its own: {_INSTALL}")
    probe = subprocess.run(
        [found, "--help"], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=os.environ | _QUIET
    )
    if "No module named 'imghdr'" in probe.stderr:
        raise ValueError(
            f"{found} runs on Python 3.13 or newer, which has no imghdr; make its environment with Python 3.12 or "
            "older, or install standard-imghdr there"
        )
    if probe.returncode:
        raise ValueError(f"{found} does not start: {_last_lines(probe.stderr)}")
    return os.path.abspath(found)


def command(program: str, plan: Plan, pace: Pace) -> list[str]:
    """img2dataset's command line for all of a plan; it skips shards that have their stats."""
    recipe = plan.recipe
    options: dict[str, Any] = {
        "url_list": plan.input.absolute(),
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": json.dumps(plan.columns),
        "output_folder": plan.out.absolute(),
        "output_format": "webdataset",
        "incremental_mode": "incremental",
        "number_sample_per_shard": recipe.shard_size,
        "oom_shard_count": plan.digits,
        "image_size": recipe.size,
        "resize_mode": recipe.resize,
        "resize_only_if_bigger": not recipe.enlarge,
        "min_image_size": recipe.min_side,
        "encode_format": recipe.format,
        "encode_quality": recipe.quality,
        "extract_exif": False,  # places and cameras of private people
        "processes_count": pace.processes,
        "thread_count": pace.threads,
        "timeout": pace.timeout,
        "retries": pace.retries,
    }
    if plan.has_caption:
        options["caption_col"] = "caption"
    if recipe.max_aspect is not None:
        options["max_aspect_ratio"] = recipe.max_aspect
    return [program, *(f"--{name}={value}" for name, value in options.items())]


def fetch(program: str, plan: Plan, pace: Pace, *, lock: int) -> None:
    """Run img2dataset until all shards of a plan are there, or it gives up.

    lock  a descriptor that img2dataset holds, too, so that a second download waits for it even after we are gone
    """
    fetched = Fetched(plan).update()
    log = plan.folder / "img2dataset.log"
    with (
        open(log, "ab") as output,
        progress.bar("download", plan.rows, done=fetched.rows) as bar,
        _running(command(program, plan, pace), output.fileno(), lock) as process,
    ):
        moved, mark = time.monotonic(), ""
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            fetched.update()
            bar.move(fetched.rows, f"{fetched.downloaded:,} downloaded")
            if (now := _mark(plan, fetched, log)) != mark:
                moved, mark = time.monotonic(), now
            elif time.monotonic() - moved > 60 * pace.stall_minutes:
                say(f"img2dataset has done nothing for {pace.stall_minutes:g} minutes and was ended: run this again")
                break
    if process.returncode > 0:
        say(f"img2dataset failed with exit code {process.returncode}; {log} ends with:", _last_lines(log.read_text()))


@contextmanager
def _running(command_line: Sequence[str], output: int, lock: int) -> Iterator[subprocess.Popen[bytes]]:
    """img2dataset and the processes that it starts; all of them are gone at the end."""
    process = subprocess.Popen(
        command_line,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=os.environ | _QUIET,
        start_new_session=True,
        pass_fds=(lock,),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # on SIGTERM or SIGINT its processes stay behind
        process.wait()


def _mark(plan: Plan, fetched: Fetched, log: Path) -> str:
    """Changes whenever img2dataset gets on."""
    open_tars = [tar for tar in plan.out.glob("*.tar") if int(tar.stem) not in fetched.shards]
    sizes = [tar.stat().st_size for tar in (*open_tars, log)]
    return f"{len(fetched.shards)} {sum(sizes)} {len(sizes)}"


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LAST_WORDS:])


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Hold the only right to write into `out`.

    raises  ValueError where another download, or one that outlived its starter, writes there
    """
    folder = out / ".download"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another download writes into {out}; wait for it or end it") from error
        yield file.fileno()


def _recipe(arguments: argparse.Namespace, removed: pa.Array) -> Recipe:
    quality = _QUALITY[arguments.format] if arguments.quality is None else arguments.quality
    return Recipe(
        metadata=arguments.metadata,
        url_column=arguments.url_column,
        caption_column=arguments.caption_column,
        removal_list_sha256=storage.digest(removed.to_pylist()) if len(removed) else None,
        size=arguments.size,
        resize=arguments.resize,
        enlarge=not arguments.keep_small,
        min_side=arguments.min_side,
        max_aspect=arguments.max_aspect,
        format=arguments.format,
        quality=quality,
        shard_size=arguments.shard_size,
    )


def _summary(report: dict[str, Any], out: Path, report_file: Path) -> list[str]:
    asked, failed = max(report["asked"], 1), sum(report["failed"].values())
    lines = [
        f"asked for {report['asked']:,} = downloaded {report['downloaded']:,} ({report['downloaded'] / asked:.1%}) + "
        f"failed {failed:,} ({failed / asked:.1%}) + pending {report['pending']:,}"
    ]
    lines += [f"  failed {n:9,} {n / asked:6.1%}  {reason}" for reason, n in report["failed"].items()]
    lines += [f"  not asked for {n:,}: {reason}" for reason, n in report["left_out"].items()]
    lines.append(f"shards: {report['shards']:,} of {report['shards_planned']:,} in {out}")
    if report["pending"]:
        lines.append(f"  those missing failed or were not reached (see {out / '.download/img2dataset.log'}): run again")
    elif report["worth_another_try"]:
        lines.append(f"  {report['worth_another_try']:,} failures may have passed: add --retry-failed")
    return [*lines, f"report: {report_file}", f"next: python -m data_tools.index {out}"]


def _work(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if storage.is_remote(arguments.out_name):
        raise ValueError(f"{arguments.out_name} is remote; download to a local disk, then copy the shards")
    pace = Pace(
        processes=arguments.processes,
        threads=arguments.threads,
        timeout=arguments.timeout,
        retries=arguments.retries,
        stall_minutes=arguments.stall_minutes,
    )
    removed = removal_list(arguments.removal_list) if arguments.removal_list else pa.array([], pa.string())
    recipe = _recipe(arguments, removed)
    program = find_img2dataset(arguments.img2dataset)
    with _alone(out) as lock:
        plan = Plan.load(out)
        if plan is None:
            plan = prepare(out, recipe, removed)
        plan.require(recipe)
        fetched = _finish(program, plan, pace, lock)
        if arguments.retry_failed and fetched.rows == plan.rows and (again := plan.add_round()):
            say(f"asking again for {again:,} rows that failed")
            fetched = _finish(program, plan, pace, lock)
    report_file = arguments.report or plan.folder / "report.json"
    report = fetched.to_dict()
    storage.write_json(report_file, report)
    say(*_summary(report, out, report_file))
    return 1 if report["pending"] or not report["downloaded"] else 0


def _finish(program: str, plan: Plan, pace: Pace, lock: int) -> Fetched:
    """Fetch what is missing; shards that are not whole are gone before and after."""
    if broken := plan.tidy():
        say(f"{len(broken):,} shards were cut short by an earlier stop and are fetched again, {broken[0]} first")
    if len(Fetched(plan).update().shards) < plan.shards:
        fetch(program, plan, pace, lock=lock)
        plan.tidy()
    return Fetched(plan).update()


def _resize(name: str) -> str:
    if name == "border":
        raise argparse.ArgumentTypeError(
            f"border pads images with white bars, which a model learns to draw; choose {', '.join(_RESIZES)}"
        )
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.download",
        description="Fetch the images of LAION-style metadata into WebDataset shards with img2dataset.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("metadata", help=".parquet files: a directory, brace range, glob or list, local or remote")
    parser.add_argument("out_name", metavar="out", help="a local directory for the shards")
    parser.add_argument("--size", type=int, default=256, help="pixels of the side that is resized (default: 256)")
    parser.add_argument(
        "--resize",
        type=_resize,
        choices=_RESIZES,
        default=_RESIZES[0],
        help="center_crop and keep_ratio bring the shorter side to SIZE, keep_ratio_largest the longer one "
        "(default: center_crop)",
    )
    parser.add_argument("--keep-small", action="store_true", help="leave images smaller than SIZE as they are")
    parser.add_argument("--min-side", type=int, default=0, help="reject images with a shorter side (default: 0)")
    parser.add_argument("--max-aspect", type=float, help="reject images of longer / shorter side above this")
    parser.add_argument("--format", choices=tuple(_QUALITY), default="jpg", help="how images are stored (default: jpg)")
    parser.add_argument(
        "--quality", type=int, help="jpg and webp 1-100 (default: 95), png compression 0-9 (default: 6)"
    )
    parser.add_argument("--shard-size", type=int, default=10_000, help="rows of a shard (default: 10000)")
    parser.add_argument("--url-column", help="column of URLs, if it has no usual name")
    parser.add_argument("--caption-column", help="column of captions, if it has no usual name or there are several")
    parser.add_argument("--removal-list", type=Path, help="what must not be fetched")
    parser.add_argument("--retry-failed", action="store_true", help="at the end, ask again for what failed")
    parser.add_argument("--retries", type=int, default=2, help="further tries of a failed URL at once (default: 2)")
    parser.add_argument("--timeout", type=int, default=10, help="seconds (default: 10)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="(default: one for each core)")
    parser.add_argument("--threads", type=int, default=64, help="of a process (default: 64)")
    parser.add_argument(
        "--stall-minutes", type=float, default=30, help="end img2dataset after this long without progress (default: 30)"
    )
    parser.add_argument("--img2dataset", metavar="PROGRAM", help=f"(default: here, on PATH or in {_OWN_PLACE})")
    parser.add_argument("--report", type=Path, help="where the JSON report goes (default: OUT/.download/report.json)")
    arguments = parser.parse_args(argv)
    arguments.out = Path(arguments.out_name)
    return run_tool(_work, arguments)


if __name__ == "__main__":
    sys.exit(main())
