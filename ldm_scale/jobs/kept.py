"""Long work in batches, each kept on disk once it is done, so that what was broken off goes on where it was.

A batch's result does not depend on the world, so any number of processes may go on. On the number that began, sums over
batches come out the same to the last bit: each rank has the batches that it would have had, in their order.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ldm_scale.core import runtime, storage
from ldm_scale.core.shares import shared

Between = Callable[[], None]
"""Called between batches of something that takes long, by all ranks together; what it raises ends the rest."""
Result = dict[str, Tensor]
"""Of a batch, on the CPU."""

_IDENTITY = "identity.json"

log = runtime.logger(__name__)


class Kept:
    """What is done of one piece of work. All ranks share its folder; `write` and `read` alone are not collective."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Go on with what is there of the same work; what is there of another is deleted.

        identity  everything that a result depends on, plain values
        """
        self._folder = folder
        if runtime.is_main():
            wanted, file = storage.digest(identity), folder / _IDENTITY
            if not file.exists() or storage.read_json(file) != wanted:
                forget(folder)
                self._put(file, storage.canonical_json(wanted))
        runtime.barrier()

    def numbers(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `make` returns, which is not called where it is known already."""
        file = self._folder / f"{name}.json"
        known: dict[str, float] | None = None
        if runtime.is_main() and file.exists():
            known = storage.read_json(file)
        known = runtime.gathered(known)[0]
        if known is None:
            known = make()
            if runtime.is_main():
                self._put(file, storage.canonical_json(known))
        return known

    def done(self, parts: Sequence[range]) -> int:
        """How many of the first `parts` need not be made again: whole rounds of all ranks, or all there are."""
        there = 0
        if runtime.is_main():
            there = next((n for n, part in enumerate(parts) if not self._file(part).exists()), len(parts))
        there = runtime.gathered(there)[0]
        return there if there == len(parts) else there - there % runtime.world()

    def write(self, part: range, result: Result) -> None:
        """Keep the result of `part`."""
        self._put(self._file(part), safetensors.torch.save(result))

    def read(self, part: range) -> Result:
        """What `write` kept."""
        found: Result = safetensors.torch.load_file(self._file(part))
        return found

    def _put(self, file: Path, content: bytes) -> None:
        """Write, or where the disk is full, leave it out: it will have to be made again."""
        try:
            with storage.atomic_write(file) as stream:
                stream.write(content)
        except OSError as error:
            log.warning("%s: %s", file, error.strerror)

    def _file(self, part: range) -> Path:
        return self._folder / f"{part.start:09d}.safetensors"


def forget(folder: Path) -> None:
    """Delete what is kept, if anything. Called by rank 0."""
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def kept_beside(out: Path) -> Iterator[Path]:
    """Where to keep what is done of the work for the file `out`, until it is all done."""
    folder = out.with_name(f"{out.name}.unfinished")
    yield folder
    if runtime.is_main():
        forget(folder)


def results(
    parts: Sequence[range], make: Callable[[range], Result], between: Between, kept: Kept | None
) -> Iterator[tuple[range, Result]]:
    """This rank's share of `parts`, each with what `make` makes of it, or made of it before. Collective.

    make    called by all ranks together, so it may be collective itself; where parts run out, its result is dropped
    raises  ValueError on all ranks where `make` does on one
    """
    done = 0 if kept is None else kept.done(parts)
    for number, (part, counts) in enumerate(shared(parts)):
        between()
        if kept is not None and number * runtime.world() < done:
            result = kept.read(part) if counts else {}
        else:
            result = runtime.together(partial(make, part))
            if kept is not None and counts:
                kept.write(part, result)
        if counts:
            yield part, result
