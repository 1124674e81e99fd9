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

from ldm_scale.core.run_dir import RunDir

LAUNCHES = ("start", "resume")
"""Events that begin a launch."""
STALE_S = 900.0
"""Seconds without a sign of life after which a running run counts as stale."""
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


@dataclass(slots=True)
class Launch:
    """Processes that were started together, and how long they are known to have lived."""

    world: int
    began: float
    """When rank 0 was started, in seconds since the epoch."""
    ended: float
    """The last sign of them."""
    images_seen: int
    """Where they began."""

    @classmethod
    def all_of(cls, metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[Self]:
        """Those of a run, in order, by what it left; not what was made beside it.

        What a killed launch logged after its last checkpoint is taken back; the next one's event tells how long nobody
        lived before it, and so how long that launch did. One that failed before it began says so in `failed`. Where
        that tells of no process, a queue said it.
        """
        found: list[Self] = []
        for line in sorted([*metrics, *events], key=lambda line: line["time"]):
            kind, began = line.get("event"), line.get("launched")
            failed_early = kind == "failed" and began is not None and (not found or began > found[-1].ended)
            if kind in LAUNCHES or failed_early:
                began = line["time"] if began is None else began
                if found and "idle_s" in line:
                    found[-1].ended = began - line["idle_s"]
                found.append(cls(line["world"], began, line["time"], line["images_seen"]))
            elif found and (kind != "failed" or began is not None):
                found[-1].ended = line["time"]
        return found


def idle_before(run_dir: RunDir, launched: float) -> float:
    """Seconds between the last sign of life in a run directory and a process that started at `launched`."""
    before = Launch.all_of(run_dir.read_lines(run_dir.metrics), run_dir.read_lines(run_dir.events))
    return max(0.0, launched - before[-1].ended) if before else 0.0


def state_of(status: Mapping[str, Any], *, silent_s: float, stale_s: float = STALE_S) -> str:
    """A run's state; `stale` where it says that it is running and gave no sign for too long: killed, perhaps."""
    state = str(status["state"])
    return "stale" if state == "running" and silent_s > stale_s else state


def gpu_hours(launches: Sequence[Launch]) -> Callable[[float], float]:
    """GPU hours spent by a moment: from each launch to the last sign of it, times its processes."""
    return lambda now: sum(one.world * max(0.0, min(now, one.ended) - one.began) for one in launches) / 3600
