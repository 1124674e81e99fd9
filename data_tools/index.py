"""Index every shard of a source ahead of time, by several processes.

Whoever opens shards that have no index makes it, one shard after the other; this makes them all at once. An index
appears whole or not at all and the manifest comes last, so that the tool may be killed at any moment: run again, it
makes what is missing and nothing else.
"""

import argparse
import mmap
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.command_line import precompute_command, run_tool, say
from ldm_scale.core import progress, storage
from ldm_scale.data.shards import ShardSet, ShardSummary, Sidecars, tar_sizes
from ldm_scale.data.tar import BLOCK, Damage, Fault, split_name, walk

DAMAGE = (Fault.TRUNCATED, Fault.NO_END, Fault.DAMAGED_HEADER, Fault.DAMAGED_SIZE, Fault.INCOMPLETE)
"""Reasons to reject a sample that say its tar is not as it was written; others say what was written."""
_SHOWN = 10

_EXAMPLES = """\
examples:
  python -m data_tools.index '/data/laion/{00000..41454}.tar' -j 16
      indexes and manifest.json in /data/laion/.ldm/
  python -m data_tools.index s3://bucket/laion --index-dir /scratch/index -j 32 --report index.json
      a source that cannot be written: later, give data.index_dir=/scratch/index to the jobs
  python -m data_tools.index data/photos/train --energon
      also NNNNN.tar.idx beside each tar, as Megatron-Energon looks for it

exit code: 0; 1 where a tar is damaged or cannot be read (whatever is whole is indexed all the same); 2 for a mistake
in the arguments. --report writes what the summary says as JSON.
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one shard."""

    built: bool
    """Its index was missing and is there now."""
    error: str = ""
    """Why it could not be read, or Energon's index not be written."""


def build(url: str, sidecars: Sidecars, energon: bool) -> Outcome:
    """Index one shard, unless that is done."""
    built = False
    try:
        if sidecars.read(url, *tar_sizes([url])) is None:
            sidecars.build(url)
            built = True
        if energon and _lacks_energon(url):
            write_energon(url)
    except OSError as error:
        return Outcome(built, f"{url}: {error.strerror or error}")
    return Outcome(built)


def write_energon(tar: str) -> None:
    """Write Energon's own index of a local tar beside it: little-endian uint64 offsets of the samples, then the end."""
    with open(tar, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
    with memoryview(data) as view:
        offsets = sample_offsets(view)
    with storage.atomic_write(energon_index(tar)) as out:
        out.write(np.array(offsets, "<u8").tobytes())


def sample_offsets(data: memoryview) -> list[int]:
    """Where in a tar each sample begins, headers included, and where the last one ends.

    As in Energon, members that follow each other under one key are a sample.
    """
    offsets, end, last = [], 0, None
    for item in walk(data):
        if isinstance(item, Damage):
            continue
        split = split_name(item.name)
        if split is not None and split[0] != last:
            last = split[0]
            offsets.append(end)
        end = item.offset + -(-item.length // BLOCK) * BLOCK
    return [*offsets, end]


def energon_index(tar: str) -> Path:
    """Where Energon looks for its index of a tar."""
    return Path(f"{tar}.idx")


def build_all(urls: Sequence[str], sidecars: Sidecars, *, energon: bool, workers: int) -> list[Outcome]:
    """Do `build` for each shard."""
    work = partial(build, sidecars=sidecars, energon=energon)
    outcomes, unreadable = [], 0
    with progress.bar("indexing", len(urls), unit="shards") as bar:
        for outcome in _spread(work, urls, min(workers, len(urls))):
            outcomes.append(outcome)
            unreadable += bool(outcome.error)
            bar.advance(1, f"{unreadable} unreadable" if unreadable else "")
    return outcomes


def _spread(work: Callable[[str], Outcome], urls: Sequence[str], workers: int) -> Iterator[Outcome]:
    """Results of `work` in order, from this process where one worker is enough."""
    if workers <= 1:
        yield from map(work, urls)
        return
    # Not forked from here: fsspec keeps threads and connections that would not survive it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ldm_scale.core.progress", "ldm_scale.data.shards"])  # slow to import: once
    try:
        with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
            yield from pool.map(work, urls)
    except BrokenProcessPool as error:
        raise OSError(
            "a worker was killed, perhaps for want of memory: run the same again, with a smaller -j"
        ) from error


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "called in a worker only"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _lacks_energon(url: str) -> bool:
    index = energon_index(url)
    return not index.exists() or index.stat().st_mtime < os.stat(url).st_mtime


def damage_of(summary: ShardSummary) -> dict[str, int]:
    """What says that a shard's tar is damaged, by reason."""
    return {reason: count for reason, count in summary.rejected.items() if reason in DAMAGE}


def report_of(source: str, outcomes: Sequence[Outcome], shards: ShardSet | None) -> dict[str, Any]:
    """The machine-readable report; `shards` is None where some could not be read."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    report = {"source": source, "built": sum(outcome.built for outcome in outcomes), "unreadable": errors}
    if shards is None:
        return report
    damaged = {summary.name: damage_of(summary) for summary in shards.summaries if damage_of(summary)}
    return report | {
        "shards": len(shards.urls),
        "samples": shards.n,
        "bytes": sum(summary.bytes for summary in shards.summaries),
        "rejected": shards.rejected,
        "damaged": damaged,
        "folders": sorted({shards.sidecars.folders(url)[-1] for url in shards.urls}),
        "order_id": shards.order_id,
        "content_id": shards.content_id,
    }


def summary_of(report: dict[str, Any], index_dir: str | None) -> list[str]:
    """What was found, where it lies, and what to type next."""
    if report["unreadable"]:
        lines = [f"{len(report['unreadable'])} shards could not be read; no manifest was written:"]
        lines += [f"  {error}" for error in report["unreadable"][:_SHOWN]]
        return [*lines, "next: the same command again; it does only what is missing"]
    lines = [
        f"{report['samples']:,} samples in {report['shards']:,} shards, {report['bytes'] / 1e9:,.3f} GB; "
        f"{report['built']:,} indexes made now",
        *(f"  rejected {count:,} {reason}" for reason, count in report["rejected"].items()),
        *(f"  indexes and manifest in {folder}" for folder in report["folders"]),
    ]
    damaged: dict[str, dict[str, int]] = report["damaged"]
    if damaged:
        lines.append(f"{len(damaged)} damaged shards: fetch or write them again, then run this again")
        lines += [f"  {name}: {', '.join(reasons)}" for name, reasons in list(damaged.items())[:_SHOWN]]
    return [*lines, f"next: {precompute_command(report['source'], index_dir=index_dir)}"]


def _work(arguments: argparse.Namespace) -> int:
    if arguments.jobs < 1:
        raise ValueError(f"-j {arguments.jobs}; at least 1 process")
    index_dir = arguments.index_dir.rstrip("/") if arguments.index_dir else None
    sidecars = Sidecars(index_dir)
    urls = storage.expand(arguments.source)
    if arguments.energon and any(map(storage.is_remote, urls)):
        raise ValueError(f"--energon writes beside the tars, but {arguments.source} is remote: leave it out")
    sizes = tar_sizes(urls)
    missing = [url for url, size in zip(urls, sizes, strict=True) if sidecars.read(url, size) is None]
    for one_of_folder in {url.rpartition("/")[0]: url for url in missing}.values():
        sidecars.writable(one_of_folder)
    to_do = sorted({*missing, *(url for url in urls if arguments.energon and _lacks_energon(url))})
    outcomes = build_all(to_do, sidecars, energon=arguments.energon, workers=arguments.jobs)
    is_readable = not any(outcome.error for outcome in outcomes)
    shards = ShardSet.open(arguments.source, index_dir) if is_readable else None
    report = report_of(arguments.source, outcomes, shards)
    if arguments.report:
        storage.write_json(arguments.report, report)
    say(*summary_of(report, index_dir))
    return 1 if report["unreadable"] or report["damaged"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, 1 where a tar is damaged, 2 for a mistake in the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.index",
        description="Index the shards of a source by several processes, and write its manifest.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="directory, brace range, glob, list file or tar; local or remote; several by ::")
    parser.add_argument("--index-dir", help="folder for the indexes of a source that is remote or read-only")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a CPU)")
    parser.add_argument("--energon", action="store_true", help="also write Megatron-Energon's index beside each tar")
    parser.add_argument("--report", type=Path, help="JSON file for what the summary says")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
