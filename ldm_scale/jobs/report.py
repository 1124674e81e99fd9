"""Write `report.html` anew, or one page that shows several runs side by side.

python -m ldm_scale.jobs.report RUN                           RUN/report.html
python -m ldm_scale.jobs.report RUN RUN ... [--out FILE]      comparison.html
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.report import write_comparison, write_report


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("runs", type=Path, nargs="+", help="run directories")
    parser.add_argument("--out", type=Path, default=Path("comparison.html"), help="of several (default: %(default)s)")
    arguments = parser.parse_args(argv)
    runs = [RunDir(path) for path in arguments.runs]
    try:
        print(write_report(runs[0]) if len(runs) == 1 else write_comparison(runs, arguments.out))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
