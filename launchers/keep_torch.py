"""Constraints that leave the torch of this Python as it is: `python launchers/keep_torch.py constraints.txt`.

For `make setup TORCH=system`. What belongs to a torch (torchvision, Triton, CUDA's libraries) loses its pin.
"""

import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path

OLDEST = (2, 11)
_BELONGS = re.compile(r"(torch|torchvision|triton|nvidia-.*|cuda-.*)==")


def main(arguments: Sequence[str]) -> int:
    """Print the constraints; returns the exit code: 2 where there is no torch, or too old a one."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        print(f"error: TORCH=system, but {sys.executable} sees no torch: make a new VENV= by PYTHON=", file=sys.stderr)
        return 2
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        print(f"error: TORCH=system is torch {version}, older than {oldest}: leave out TORCH=system", file=sys.stderr)
        return 2
    print(f"torch=={version}")
    print("\n".join(line for line in Path(arguments[0]).read_text().splitlines() if not _BELONGS.match(line)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
