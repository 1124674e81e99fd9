"""How the tools here speak: plain lines on standard output, mistakes as one line with an exit code."""

import argparse
from collections.abc import Callable

from rich.console import Console


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
        Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(f"error: {error}")
        return 2
