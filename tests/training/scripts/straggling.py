"""Trains in the real loop on several engines; the last rank is slow: in its own passes, or under zero2 in its data.

usage  straggling.py OUT
"""

import sys
import time
from pathlib import Path
from typing import Any

import guarded
import numpy as np
import tiny

from ldm_scale.core import runtime
from ldm_scale.training.guards import GuardConfig
from ldm_scale.training.steps import Metrics

NAP_S = 0.1


class SlowStep(guarded.Step):
    def __call__(self, batch: guarded.Batch, learning_rate: float, images_seen: int) -> Metrics:
        if self.engine.rank == 1:
            time.sleep(NAP_S)
        return super().__call__(batch, learning_rate, images_seen)


class SlowSource(guarded.Source):
    def read(self, positions: np.ndarray, **how: Any) -> guarded.Batch:
        if runtime.rank() == 1:
            time.sleep(NAP_S)
        return super().read(positions, **how)


for kind in ("ddp", "zero1", "zero2"):
    engine = tiny.engine_of(kind)
    slow_data = kind == "zero2"
    source = (SlowSource if slow_data else guarded.Source)(factor=1.0)
    run, step = guarded.training(engine, Path(sys.argv[1]) / kind, GuardConfig(), source, log_every=16)
    if not slow_data:
        run.step = SlowStep(engine)
    guarded.ended(run, step)
    run.checkpoints.close()
    engine.close()
runtime.leave()
