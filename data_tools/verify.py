"""Shards or a latent cache, checked again from their bytes: nothing that a reader would silently skip goes unnamed."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools.command_line import run_tool, say
from data_tools.shard_checks import Findings, Layout, Problem, check_all, hashed_again, mapped, members, stored_index
from data_tools.verify_cache import is_cache, repair, verify_cache
from ldm_scale.core import storage
from ldm_scale.data.index import IMAGE_FIELDS
from ldm_scale.data.samples import MalformedMember, Sample
from ldm_scale.data.shards import Sidecars
from ldm_scale.data.views import RemovalList
from ldm_scale.images.decode import UndecodableImage, decode

LEVELS = ("fast", "hash", "decode")
_SHOWN = 20
_PICTURES = (*IMAGE_FIELDS, "seg.png")

_EXAMPLES = """\
examples:
  python -m data_tools.verify data/laion
      headers only: damaged or missing places, sample counts against the index, .parquet and _stats.json
  python -m data_tools.verify data/laion --level hash --report verify.json
      every byte against the index; needs the indexes that data_tools.index made when the data were sound
  python -m data_tools.verify data/laion --level decode
      and every image decoded, every class and box parsed
  python -m data_tools.verify runs/latents --level hash --repair
      a latent cache: manifest, records, fingerprint and bytes; damaged shards are marked, so that running
      precompute_latents again encodes only those

levels:
  fast    headers; a flipped bit inside an image is not seen
  hash    + every byte read and compared with its checksum
  decode  + every image decoded; of a cache, every moment finite and the recorded statistics counted again
Exit code: 0 where all is well, 1 where something is wrong, 2 for a mistake in the arguments. The JSON report goes to
--report. Remote shards are fetched whole, one for each thread, into the temporary directory.
"""


def check_images(path: str, url: str, level: str, index_dir: str | None) -> Findings:
    """Everything about one shard of images."""
    name = url.rpartition("/")[2]
    index, problems = stored_index(url, index_dir, name)
    with mapped(path) as data:
        layout = Layout(name, data)
        found = Findings(len(layout.keys), [*problems, *layout.problems])
        if index is not None:
            found.add(*layout.against(index, name))
        found.add(*_against_sidecars(url, name, set(layout.keys)))
        if level != "fast":
            fresh, changed = hashed_again(path, name, index)
            found.add(*changed)
        if level == "decode":
            removed = RemovalList.read(Sidecars(index_dir).removal_lists(url)).of(name)
            for row in range(fresh.header.n):
                if (key := fresh.key(row)) not in removed:
                    found.add(*_decoded(name, key, members(data, fresh, row)))
    return found


def _against_sidecars(url: str, name: str, keys: set[str]) -> list[Problem]:
    """The counts that img2dataset wrote when the shard was whole, and the samples that its parquet names."""
    stem, problems = url.removesuffix(".tar"), list[Problem]()
    try:
        said = int(storage.read_json(f"{stem}_stats.json")["successes"])
        if said != len(keys):
            problems.append(Problem(name, None, "other_count_than_stats", f"{len(keys)} samples, _stats.json: {said}"))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError) as error:
        problems.append(Problem(name, None, "damaged_stats", str(error)))
    try:
        problems += [Problem(name, key, "lost_sample", "the .parquet has it") for key in _parquet_keys(stem, keys)]
    except FileNotFoundError:
        pass
    except (ValueError, OSError) as error:
        problems.append(Problem(name, None, "damaged_parquet", str(error)))
    return problems


def _parquet_keys(stem: str, keys: set[str]) -> list[str]:
    """Keys that the parquet says were written and that are not among `keys`."""
    with storage.open_read(f"{stem}.parquet") as file:
        parquet = pq.ParquetFile(file)
        columns = [name for name in ("key", "status") if name in parquet.schema_arrow.names]
        if "key" not in columns:
            return []
        rows = parquet.read(columns).to_pylist()
    return [row["key"] for row in rows if row.get("status") in (None, "success") and row["key"] not in keys]


def _decoded(shard: str, key: str, found: dict[str, bytes]) -> list[Problem]:
    problems = []
    for name in _PICTURES:
        try:
            if name in found:
                decode(found[name])
        except UndecodableImage as error:
            problems.append(Problem(shard, key, f"{error.reason}_{name}", str(error)))
    try:
        Sample.parse(key, found)
        found.get("txt", b"").decode()
    except MalformedMember as error:
        problems.append(Problem(shard, key, error.reason, str(error)))
    except UnicodeDecodeError as error:
        problems.append(Problem(shard, key, "malformed_txt", str(error)))
    return problems


def check_dataset(urls: Sequence[str], index_dir: str | None) -> list[Problem]:
    """What no single shard shows: shards that were indexed and are gone, and shards that were never finished."""
    problems: list[Problem] = []
    for folder in sorted({url.rpartition("/")[0] for url in urls}):
        there = {url.rpartition("/")[2]: url for url in urls if url.rpartition("/")[0] == folder}
        some_url = next(iter(there.values()))
        everything = {url.rpartition("/")[2] for url in storage.expand(folder or ".")}
        for name in sorted(Sidecars(index_dir).read_summaries(some_url).keys() - everything):
            problems.append(Problem(name, None, "lost_shard", f"{folder} had it when it was indexed"))
        finished = {url.rpartition("/")[2] for url in _stats_files(folder or ".")}
        for name in sorted(there) if finished else ():
            if f"{name.removesuffix('.tar')}_stats.json" not in finished:
                problems.append(Problem(name, None, "no_stats", "others have _stats.json: it was never finished"))
    return problems


def _stats_files(folder: str) -> list[str]:
    try:
        return storage.expand(folder, "_stats.json")
    except FileNotFoundError:
        return []


def verify_images(source: str, level: str, threads: int, index_dir: str | None) -> Findings:
    """Check shards of images."""
    urls = storage.expand(source)

    def check(path: str, url: str) -> Findings:
        return check_images(path, url, level, index_dir)

    found = check_all(urls, check, threads)
    found.problems[:0] = check_dataset(urls, index_dir)
    return found


def _next_step(arguments: argparse.Namespace, cache: bool, damaged: Sequence[str]) -> list[str]:
    if not damaged:
        return []
    if not cache:
        return [
            f"damaged shards: {len(damaged):,}; fetch or make them again, or go on without: readers skip what is named"
        ]
    again = "run precompute_latents.py again with the settings that made this cache: it encodes only these"
    if arguments.repair:
        return [f"marked for encoding: {', '.join(damaged[:_SHOWN])}", f"next: {again}"]
    command = f"python -m data_tools.verify {arguments.source} --level {arguments.level} --repair"
    return [f"damaged shards: {', '.join(damaged[:_SHOWN])}", f"next: {command}", f"  then {again}"]


def _work(arguments: argparse.Namespace) -> int:
    cache = is_cache(arguments.source)
    if arguments.repair and (not cache or storage.is_remote(arguments.source)):
        raise ValueError(f"--repair is for a local latent cache; {arguments.source} is none")
    if arguments.threads < 1:
        raise ValueError(f"--threads {arguments.threads}; must be at least 1")
    if cache:
        found = verify_cache(arguments.source.rstrip("/"), arguments.level, arguments.threads)
    else:
        found = verify_images(arguments.source, arguments.level, arguments.threads, arguments.index_dir)
    damaged = sorted({problem.shard for problem in found.problems if problem.shard})
    if arguments.repair:
        repair(Path(arguments.source), damaged)
    if arguments.report:
        storage.write_json(arguments.report, _report(arguments, found, damaged))
    say(*(str(problem) for problem in found.problems[:_SHOWN]))
    if len(found.problems) > _SHOWN:
        say(f"... {len(found.problems) - _SHOWN:,} more" + ("" if arguments.report else "; all of them with --report"))
    what = "latents" if cache else "samples"
    verdict = "all is well" if not found.problems else f"{len(found.problems):,} problems in {len(damaged):,} shards"
    say(f"{arguments.source}: {found.samples:,} {what}, level {arguments.level}: {verdict}")
    say(*_next_step(arguments, cache, damaged))
    return 1 if found.problems else 0


def _report(arguments: argparse.Namespace, found: Findings, damaged: Sequence[str]) -> dict[str, Any]:
    return {
        "source": arguments.source,
        "level": arguments.level,
        "ok": not found.problems,
        "samples": found.samples,
        "reasons": dict(Counter(str(problem.reason) for problem in found.problems)),
        "damaged_shards": list(damaged),
        "problems": [asdict(problem) for problem in found.problems],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.verify",
        description="Check shards or a latent cache, and name everything that is wrong.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="shards (directory, brace range, glob, list, URL), or a cache's directory")
    parser.add_argument("--level", choices=LEVELS, default="fast", help="how deep to look (default: fast)")
    parser.add_argument("--repair", action="store_true", help="of a cache: mark damaged shards to be encoded again")
    parser.add_argument("--threads", type=int, default=8, help="shards looked at together (default: 8)")
    parser.add_argument("--index-dir", help="where the indexes lie if not beside the shards")
    parser.add_argument("--report", type=Path, help="write a JSON report here")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
