"""Goodput: of all the time since a run was first launched, the share in which it learned something that was kept.

The rest is lost: to waiting for data, checkpoints, evaluations, start-up, time without any process, and to steps that
were taken again or came to nothing. The last is what nothing else explains; it also has, at each launch, the steps
between the last log line and the checkpoint that was resumed from.

Every log line tells the shares so far; so where numbers are taken back, what they say of time is taken back too. The
event of each launch tells when its process started, and for how long there had been none.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir

LAUNCHES = ("start", "resume")
"""Events that begin a launch."""
LOST = ("data", "checkpoint", "evaluation", "startup", "idle", "replay")
_MEASURED = ("train", *LOST[:-1])  # replay is the rest


@dataclass(slots=True)
class Ledger:
    """Seconds of one run over all its launches; the clock is that of rank 0's host."""

    began: float
    """When the first process started, in seconds since the epoch."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_MEASURED, 0.0))
    """By what was done; `train` is kept."""

    @classmethod
    def read(cls, run_dir: RunDir) -> Self:
        """What a run's metrics and events say; the launch that is under way has written its event."""
        events = run_dir.read_lines(run_dir.events)
        launches = [event for event in events if event["event"] in LAUNCHES and "launched" in event]  # once it was not
        lines = run_dir.read_lines(run_dir.metrics)
        line = next((line for line in reversed(lines) if "perf/goodput" in line), None)
        if line is None:
            ledger, told = cls(launches[0]["launched"]), 0.0
        else:
            told, allocated = line["time"], 3600 * line["perf/hours"]
            shares = {"train": line["perf/goodput"], **{part: line[f"perf/lost_{part}"] for part in LOST[:-1]}}
            ledger = cls(told - allocated, {part: share * allocated for part, share in shares.items()})
        for launch in launches:
            if launch["time"] > told:
                ledger.add({"startup": launch["time"] - launch["launched"], "idle": launch["idle_s"]})
        return ledger

    def add(self, spent: Mapping[str, float]) -> None:
        """Take down seconds by what was done; what is not among the losses is training."""
        for part, seconds in spent.items():
            self.seconds[part if part in LOST else "train"] += seconds

    def shares(self, now: float) -> dict[str, float]:
        """Of the time up to `now`: `perf/goodput` and the losses, which sum to one; and that time in hours."""
        allocated = max(now - self.began, sum(self.seconds.values()), 1e-9)
        shares = {part: seconds / allocated for part, seconds in self.seconds.items()}
        lost = {f"perf/lost_{part}": shares[part] for part in LOST[:-1]}
        replay = 1 - sum(shares.values())
        return {"perf/goodput": shares["train"], **lost, "perf/lost_replay": replay, "perf/hours": allocated / 3600}


def idle_before(run_dir: RunDir, launched: float) -> float:
    """Seconds between the last sign of life in a run directory and a process that started at `launched`."""
    signs = [line["time"] for file in (run_dir.metrics, run_dir.events) for line in run_dir.read_lines(file)]
    if run_dir.status.exists():
        signs.append(storage.read_json(run_dir.status)["time"])
    return launched - max((sign for sign in signs if sign < launched), default=launched)


def gpu_hours(launches: Sequence[Mapping[str, Any]], signs: Sequence[float]) -> Callable[[float], float]:
    """GPU hours spent by a moment: from each launch to the last sign of life before the next one, times its processes.

    launches  events that began one, in order
    signs     moments at which the run is known to have lived, in seconds since the epoch
    """
    ends = [*(launch["time"] for launch in launches[1:]), float("inf")][: len(launches)]
    spans = []
    for launch, end in zip(launches, ends, strict=True):
        lived = [sign for sign in signs if launch["time"] <= sign < end]
        spans.append((launch["world"], launch["time"], max(lived, default=launch["time"])))
    return lambda now: sum(world * max(0.0, min(now, end) - begin) for world, begin, end in spans) / 3600
