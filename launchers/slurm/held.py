"""Say of a training that the queue does not see it again, as of one that failed: status, event, alert.

python launchers/slurm/held.py REASON key=value ...      the training's own overrides
"""

import sys
from pathlib import Path

from ldm_scale.core.run_dir import RunDir
from ldm_scale.jobs import config, train


def main(reason: str, overrides: list[str]) -> None:
    """Write it where a training that fails by itself would."""
    job = config.compose("train", overrides)
    run_dir = RunDir(Path(job.run_dir))
    tracker = job.tracker.files(run_dir)
    train.write_failed(run_dir, tracker, reason, None)
    tracker.finish("failed")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
