"""What ends a training that has gone wrong."""

import math
from collections.abc import Mapping


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm is no longer a number."""


def require_finite(values: Mapping[str, float], images_seen: int) -> None:
    """Stop a training whose numbers are not finite; looked at when they are logged, so that no step waits for them.

    raises  TrainingDiverged naming the values
    """
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        raise TrainingDiverged(
            f"after {images_seen:,} images: {bad}. Lower optimizer.learning_rate, or set engine.precision=fp32"
        )
