"""How the tools here speak: plain lines on standard output, mistakes as one line with an exit code."""

import argparse
import re
from collections.abc import Callable

from rich.console import Console

from ldm_scale.core.secrets import without_secrets


def say(*lines: str) -> None:
    """Write lines to standard output as they are."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    for line in lines:
        console.print(line)


def run_tool(work: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Call a tool's work; a mistake that the user can mend is one line and exit code 2."""
    try:
        return work(arguments)
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(
            f"error: {without_secrets(str(error))}"
        )
        return 2


def precompute_command(images: str, *, selection: str | None = None, index_dir: str | None = None) -> str:
    """What encodes these shards, quoted as the shell and Hydra want it."""
    words = ["python precompute_latents.py +experiment=NAME", _override("data.images", images)]
    if selection is not None:
        words.append(f"'data.selection=[{selection}]'")
    if index_dir is not None:
        words.append(_override("data.index_dir", index_dir))
    return " ".join(words)


def _override(key: str, value: str) -> str:
    return f"{key}={value}" if re.fullmatch(r"[\w./:-]+", value) else f"\"{key}='{value}'\""
