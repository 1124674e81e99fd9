"""Samples that say the same thing twice, left out: equal bytes of the picture, or equal URL and text.

Of equal samples the first in order (by shard, then in the tar) stays. A quick hash of every sample narrows down, a
sha256 of what is compared confirms. No tar is rewritten; the result is a selection.

Letters: N samples, M candidates whose quick hash another sample shares.
"""

import argparse
import hashlib
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import xxhash

from data_tools.command_line import precompute_command, run_tool, say
from data_tools.metadata import open_shards, require_known_shards, sample_metadata, selected_ids
from ldm_scale.core import progress, storage
from ldm_scale.data.index import IMAGE_FIELDS
from ldm_scale.data.shards import ShardSet
from ldm_scale.data.views import Selection, write_selection

_PICTURES = (*IMAGE_FIELDS, "npy")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_CHUNK = 1024  # candidates read at a time
_LARGEST = 20  # groups shown in the report

_EXAMPLES = """\
examples:
  python -m data_tools.dedup data/photos unique.parquet
      equal bytes -> unique.parquet, for data.selection=[unique.parquet]; reads the indexes, and the candidates' bytes
  python -m data_tools.dedup data/laion unique.parquet --by bytes,url_text
      equal bytes, or equal URL and text
  python -m data_tools.dedup data/laion unique.parquet --selection large.parquet
      among the samples that data_tools.filter kept

Text is compared in lower case, NFKC, with single spaces; URLs without fragment and default port.
The report lies in unique.parquet.json unless --report says where; every group of equal samples, with the key that
stays, in unique.parquet.groups.jsonl.
Memory: 27 bytes a sample (11 GB for 400 million), 60 more for each that may equal another, and while the selection is
written about 100 for each that stays. Exit code: 2 for a mistake in the arguments.
"""


@dataclass(frozen=True, slots=True)
class Rule:
    """When two samples are the same."""

    hashes: Callable[[ShardSet, int], np.ndarray]
    """One shard -> (n,) uint64; 0 where a sample lacks what is compared."""
    proofs: Callable[[ShardSet, np.ndarray], list[bytes]]
    """Some samples, ascending -> what is compared, or a digest of it; equal exactly where the samples are."""


def _picture_hashes(shards: ShardSet, shard: int) -> np.ndarray:
    index = shards.opened(shard).index
    hashes = np.zeros(index.header.n, np.uint64)
    for field in reversed([field for field in _PICTURES if field in index.column]):
        column = index.column[field]
        np.copyto(hashes, index.xxh3[:, column], where=index.offsets[:, column] > 0)
    return hashes


def _picture_proofs(shards: ShardSet, ids: np.ndarray) -> list[bytes]:
    return [next(members[field] for field in _PICTURES if field in members) for members in shards.read(ids, _PICTURES)]


def _url_texts(shards: ShardSet, shard: int) -> list[bytes | None]:
    table = sample_metadata(shards, shard, ("url", "text"))
    rows = zip(table["url"].to_pylist(), table["text"].to_pylist(), strict=True)
    return [f"{normal_url(url)}\n{normal_text(text or '')}".encode() if url else None for url, text in rows]


def _url_text_hashes(shards: ShardSet, shard: int) -> np.ndarray:
    texts = _url_texts(shards, shard)
    return np.array([0 if text is None else xxhash.xxh3_64_intdigest(text) for text in texts], np.uint64)


def _url_text_proofs(shards: ShardSet, ids: np.ndarray) -> list[bytes]:
    numbers, places = shards.locate(ids)
    proofs: list[bytes] = []
    for shard in np.unique(numbers).tolist():
        texts = _url_texts(shards, shard)
        proofs += [texts[place] or b"" for place in places[numbers == shard].tolist()]
    return proofs


RULES = {"bytes": Rule(_picture_hashes, _picture_proofs), "url_text": Rule(_url_text_hashes, _url_text_proofs)}
"""The rules by the name that `--by` calls them."""


def normal_text(text: str) -> str:
    """One spelling of texts that a reader would call the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normal_url(url: str) -> str:
    """One spelling of a URL: scheme and host in lower case, no default port, no fragment."""
    try:
        scheme, host, path, query, _ = urlsplit(url.strip())
    except ValueError:
        return url.strip()
    host = host.lower().removesuffix(_DEFAULT_PORTS.get(scheme, "\0"))
    return urlunsplit((scheme, host, path or "/", query, ""))


def equal_samples(shards: ShardSet, rule: Rule, among: np.ndarray, what: str) -> Iterator[np.ndarray]:
    """Groups of equal samples, each ascending.

    among  (N,) bool, which samples are compared
    """
    hashes = np.zeros(shards.n, np.uint64)
    with progress.bar(f"{what}: hashes", shards.n, unit="samples") as bar:
        for shard in range(len(shards.names)):
            hashes[shards.starts[shard] : shards.starts[shard + 1]] = rule.hashes(shards, shard)
            bar.advance(int(shards.counts[shard]))
    hashes[~among] = 0
    candidates = _candidates(hashes)
    digests = np.zeros((len(candidates), 4), np.uint64)
    with progress.bar(f"{what}: candidates", len(candidates), unit="samples") as bar:
        for start, stop in _chunks(shards, candidates):
            proofs = rule.proofs(shards, candidates[start:stop])
            joined = b"".join(hashlib.sha256(proof).digest() for proof in proofs)
            digests[start:stop] = np.frombuffer(joined, np.uint64).reshape(-1, 4)
            bar.advance(stop - start)
    order = np.lexsort(digests.T)
    ends = np.flatnonzero((np.diff(digests[order], axis=0) != 0).any(axis=1)) + 1
    for group in np.split(candidates[order], ends):
        if len(group) > 1:
            yield np.sort(group)


def _candidates(hashes: np.ndarray) -> np.ndarray:
    """Samples, ascending, whose hash is not zero and occurs more than once."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    same = ordered[1:] == ordered[:-1]
    shared = np.zeros(len(hashes), bool)
    shared[1:] |= same
    shared[:-1] |= same
    return np.sort(order[shared & (ordered != 0)])


def _chunks(shards: ShardSet, ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """Spans of ascending ids that lie in one shard, not too many in each."""
    numbers, _ = shards.locate(ids)
    start = 0
    for end in (np.flatnonzero(np.diff(numbers, append=-1)) + 1).tolist():
        yield from ((begin, min(begin + _CHUNK, end)) for begin in range(start, end, _CHUNK))
        start = end


def dedup(
    source: str, out: Path, by: Sequence[str], *, index_dir: str | None = None, within: Path | None = None
) -> dict[str, Any]:
    """Write the selection of what stays and the list of groups; returns the report."""
    shards = open_shards(source, index_dir)
    selection = Selection.read(within) if within else None
    require_known_shards(shards, selection)
    among = np.zeros(shards.n, bool)
    for shard in range(len(shards.names)):
        among[selected_ids(shards, shard, selection)] = True
    stays = among.copy()
    dropped, groups, largest = Counter[str](), Counter[str](), list[dict[str, Any]]()
    with storage.atomic_write(groups_file(out)) as file:
        for name in by:
            for group in equal_samples(shards, RULES[name], among, name):
                groups[name] += 1
                dropped[name] += int(stays[group[1:]].sum())
                stays[group[1:]] = False
                largest = _note(file, shards, name, group, largest)
    how = {
        "tool": "dedup",
        "by": list(by),
        "source": source,
        "order_id": shards.order_id,
        "within": selection.digest if selection else None,
    }
    written = _write(shards, out, stays, how)
    return {
        "how": how,
        "read": int(among.sum()),
        "kept": len(written),
        "dropped": dict(dropped),
        "groups": dict(groups),
        "largest": largest,
        "digest": written.digest,
    }


def groups_file(out: Path) -> Path:
    """Where the groups of equal samples are listed."""
    return out.with_name(f"{out.name}.groups.jsonl")


def _note(
    file: IO[bytes], shards: ShardSet, by: str, group: np.ndarray, largest: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Write one group as a line; returns the largest groups so far."""
    numbers, _ = shards.locate(group)
    names = [f"{shards.names[shard]}/{key}" for shard, key in zip(numbers.tolist(), shards.keys(group), strict=True)]
    line = {"by": by, "kept": names[0], "equal": names[1:]}
    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
    entry = {"by": by, "kept": names[0], "samples": len(names)}
    return sorted([*largest, entry], key=lambda one: -one["samples"])[:_LARGEST]


def _write(shards: ShardSet, out: Path, stays: np.ndarray, how: dict[str, Any]) -> Selection:
    names: list[str] = []
    keys: list[str] = []
    for shard, name in enumerate(shards.names):
        ids = shards.shard_ids(shard)
        kept = shards.keys(ids[stays[ids]])
        names += [name] * len(kept)
        keys += kept
    return write_selection(out, names, keys, how)


def _work(arguments: argparse.Namespace) -> int:
    by = arguments.by.split(",")
    if strangers := sorted(set(by) - set(RULES)):
        raise ValueError(f"--by {strangers[0]}; choose one or more of {','.join(RULES)}")
    out: Path = arguments.out
    report = dedup(arguments.source, out, by, index_dir=arguments.index_dir, within=arguments.selection)
    report_file = arguments.report or out.with_name(f"{out.name}.json")
    storage.write_json(report_file, report)
    gone = sum(report["dropped"].values())
    lines = [f"read {report['read']:,} = kept {report['kept']:,} + dropped {gone:,}"]
    for name in by:
        groups = report["groups"].get(name, 0)
        lines.append(f"  dropped {report['dropped'].get(name, 0):9,}  equal {name} ({groups:,} groups)")
    say(
        *lines,
        f"result: {out}",
        f"groups: {groups_file(out)}",
        f"report: {report_file}",
        f"next: {precompute_command(arguments.source, selection=str(out), index_dir=arguments.index_dir)}",
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.dedup",
        description="Choose one of every group of equal samples; writes a selection.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="shards (directory, brace range, glob, list, URL)")
    parser.add_argument("out", type=Path, help="the selection to write, for instance unique.parquet")
    parser.add_argument("--by", default="bytes", help="rules, joined by commas: bytes, url_text (default: bytes)")
    parser.add_argument("--selection", type=Path, help="look only at these samples of the shards")
    parser.add_argument("--index-dir", help="where indexes go if the shards' folder cannot be written")
    parser.add_argument("--report", type=Path, help="where the JSON report goes (default: OUT.json)")
    return run_tool(_work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
