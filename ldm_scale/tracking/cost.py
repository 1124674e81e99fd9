"""What a run costs, and what was foretold of it: GPU hours, money, speed.

GPU hours count from each launch to the last sign of it: starting up is in them, and work that was lost. A forecast is
what `python -m ldm_scale.jobs.plan --keep` wrote into the run directory; of the numbers of GPUs in it, that of the last
launch counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ldm_scale.tracking.goodput import Launch, gpu_hours


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """A training on some number of GPUs, as `make plan` models it."""

    world: int
    machine: str
    images_per_s: float
    mfu: float
    gpu_hours: float

    @classmethod
    def of(cls, plan: Mapping[str, Any], world: int) -> Self | None:
        """The part of `plan.json` that is about `world` GPUs; None where nothing is."""
        for scale in plan.get("scales", []):
            if scale["step"]["world"] == world:
                return cls(
                    world=world,
                    machine=plan["machine"]["name"],
                    images_per_s=scale["step"]["images_per_s"],
                    mfu=scale["mfu"],
                    gpu_hours=scale["gpu_hours"],
                )
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """GPU hours of one run, and what one of them costs."""

    spent: float
    at_completion: float | None
    """If an image costs in the end what it did so far; None where nothing is known of the end, or none was seen."""
    planned: float | None
    price: float | None
    """Of a GPU hour, in any money."""

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        launches: Sequence[Launch],
        *,
        images: int,
        total: int | None,
        forecast: Forecast | None,
    ) -> Self:
        """Add it up.

        config    the run's; one from before there was a price has none
        images    seen so far, of `total`; a branch pays for none of its parent's
        """
        spent = gpu_hours(launches)(float("inf"))
        begun = launches[0].images_seen if launches else 0
        return cls(
            spent=spent,
            at_completion=None if total is None or images <= begun else spent * (total - begun) / (images - begun),
            planned=None if forecast is None else forecast.gpu_hours,
            price=config.get("tracker", {}).get("gpu_hour_price"),
        )
