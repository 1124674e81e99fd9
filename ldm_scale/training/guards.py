"""What keeps a training from going on wrong: every global batch's loss and gradient norm are judged, nobody waits.

Each global batch leaves a few numbers on the device: loss, gradient norm, how many ranks were told to stop, and what a
person asks for. They are summed over ranks there, copied to pinned memory, and read a few global batches later: at once
on a CPU, where the only process is told to stop, and whenever the loop waits for the device anyway, so that nothing is
saved, scored or logged unjudged. All ranks read the same numbers at the same place; so they judge alike and act
together without asking one another.

An engine moves no weights where the gradient norm is not finite; what is done besides is a policy.

Shape letters: B samples of a micro batch.
"""

import gc
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from functools import reduce
from operator import or_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm_scale.core import runtime
from ldm_scale.first_stage.base import Rebuilt
from ldm_scale.training.control import NOTHING, Wish
from ldm_scale.training.engine import Engine
from ldm_scale.training.steps import Metrics

LATE = 4
"""Optimizer steps of one micro batch after which a GPU's numbers are read, and at least one global batch: so much the
host may run ahead, which long global batches need less."""
WORST = 4
"""Samples that every rank names."""

_ADVICE = "Lower optimizer.learning_rate, set engine.precision=fp32, or look at these samples"


class TrainingDiverged(RuntimeError):
    """The loss or the gradient norm is no number any more, or far above what it was."""


class Policy(Enum):
    """What is done about a global batch whose loss or gradient norm is not finite, or a spike."""

    stop = "stop"
    """End the training as failed."""
    skip = "skip"
    """Take no optimizer step with it; everything else goes on as if it had been taken."""
    rollback = "rollback"
    """Go back to a checkpoint from before it, and pass it over when its turn comes again."""


@dataclass(kw_only=True, slots=True)
class GuardConfig:
    """What a training is guarded against, and what is done about it."""

    policy: Policy = Policy.stop
    """What is done about a global batch that is not finite, or a spike."""
    spike_sigma: float = 0.0
    """A loss or gradient norm so many standard deviations above its mean of late is a spike; 0 looks for none. The
    losses of single timesteps differ much: below 6, healthy small batches are taken for spikes."""
    spike_half_life: int = 100_000
    """Half-life of that mean and deviation, in images. Nothing is judged before so many were seen."""
    rollback_images: int = 0
    """How long before the trouble a checkpoint must have been written to be gone back to, in images."""
    pass_over_images: int = 0
    """Images passed over after going back, rounded up to global batches; 0 for the one global batch in trouble."""
    max_in_a_row: int = 8
    """More skipped global batches in a row, or rollbacks with no checkpoint written in between, end the training."""
    watchdog_minutes: float = 15.0
    """A global batch that takes longer is a hang: every rank writes its stacks to `stacks/` and ends; 0 waits for ever.
    The first one, evaluations and saves may take `phase_minutes`."""
    phase_minutes: float = 120.0
    """The same for starting, one evaluation, one save, or what comes after the last."""
    straggler: float = 0.15
    """A rank whose own work keeps the median rank waiting for more than this share of a step is told of by name."""
    straggler_intervals: int = 3
    """Log intervals in a row in which it must."""
    collect_every: int = 200
    """Python's garbage is collected every so many global batches, on all ranks at once; 0 leaves it to Python."""

    def __post_init__(self) -> None:
        for name in (
            "spike_sigma", "rollback_images", "pass_over_images", "watchdog_minutes", "phase_minutes", "straggler",
            "collect_every",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"guard.{name}={getattr(self, name)}; at least 0")
        for name in ("spike_half_life", "max_in_a_row", "straggler_intervals"):
            if getattr(self, name) < 1:
                raise ValueError(f"guard.{name}={getattr(self, name)}; at least 1")
        if self.policy is Policy.skip and self.spike_sigma > 0:
            raise ValueError(
                f"guard.spike_sigma={self.spike_sigma} with guard.policy=skip: a spike is known when its step has been "
                "taken. Use guard.policy=rollback or stop, or leave guard.spike_sigma=0 (what is not finite is skipped)"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Trouble:
    """A global batch that must not be trusted; the same on all ranks."""

    start: int
    """Stream position where it begins."""
    loss: float
    """Mean over all ranks."""
    grad_norm: float
    why: str
    samples: list[dict[str, Any]]
    """The worst ones of every rank: `{key, value, rank}`, not finite first; see `Guard.remember`."""

    def __str__(self) -> str:
        named = ", ".join(f"{one['key']} ({one['value']:g}, rank {one['rank']})" for one in self.samples[:3])
        return f"in the global batch after {self.start:,} images {self.why}; worst samples: {named or 'unknown'}"


def passed_over(events: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """The stream positions that rollbacks of a run left behind, as its events tell them."""
    return [event["passed_over"] for event in events if event["event"] == "rollback"]


@dataclass(frozen=True, slots=True)
class Heard:
    """What is known now of the global batches so far."""

    troubles: list[Trouble]
    stop: bool
    """Some rank was told to stop."""
    asked: Wish
    """By a person, of the run."""


@dataclass(slots=True)
class Usual:
    """Mean and variance of one number over the last images: exponential, plain as long as there are few."""

    mean: float = 0.0
    variance: float = 0.0
    images: int = 0

    def take(self, value: float, images: int, half_life: int) -> None:
        self.images += images
        share = max(1 - 0.5 ** (images / half_life), images / self.images)
        off = value - self.mean
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off**2)

    def limit(self, sigma: float, half_life: int) -> float:
        """The value above which another one is a spike; infinite where none is looked for, or too little is known."""
        return self.mean + sigma * math.sqrt(self.variance) if sigma > 0 and self.images >= half_life else math.inf


class Guard:
    """Judges one training. Every rank calls every method, at the same places."""

    def __init__(
        self,
        config: GuardConfig,
        engine: Engine,
        passed_over: Iterable[Sequence[int]] = (),
        *,
        late: int | None = None,
    ) -> None:
        """Watch what `engine` trains.

        passed_over  stream positions [begin, end) that no step is taken on
        late         global batches after which numbers are read; None for what the device needs
        """
        self.config = config
        self._engine = engine
        self._passed_over = [(int(begin), int(end)) for begin, end in passed_over]
        on_gpu = engine.device.type == "cuda"
        self._late = late if late is not None else max(1, LATE // engine.accumulation) if on_gpu else 0
        self._numbers = _Numbers(engine, self._late)
        self._usual = {"loss": Usual(), "gradient norm": Usual()}
        self._in_a_row, self._last_trouble, self._beyond = 0, -1, False
        self._clipped, self._steps = 0, 0
        self._outputs: deque[Tensor] = deque(maxlen=1)
        self._micro_batches: list[tuple[list[str], Tensor]] = []
        self._samples: dict[int, list[tuple[list[str], Tensor]]] = {}
        engine.module.register_forward_hook(self._see)

    @property
    def steps_to_stop(self) -> int:
        """Global batches that the device may have to do between a signal and the last save.

        The host is so far ahead when it votes, hears of that as much later, and then waits for all that it has begun.
        """
        return 2 * self._late + 1

    def passes_over(self, start: int) -> bool:
        """Whether the global batch that begins here is read only."""
        return any(start < end and begin < start + self._engine.global_batch for begin, end in self._passed_over)

    def pass_over(self, trouble: Trouble) -> tuple[int, int]:
        """From now on take no step on a global batch, and on those behind it that the configuration names."""
        images = max(self.config.pass_over_images, self._engine.global_batch)
        self._passed_over.append((trouble.start, trouble.start + images))
        return self._passed_over[-1]

    def remember(self, keys: Sequence[str]) -> None:
        """Keep what the module just said of these samples until their global batch is judged: on the device.

        That is the loss of each sample, or where a module returns something larger, the mean square of it.
        """
        self._micro_batches.append((list(keys), self._outputs.pop()))

    def hear(
        self, start: int, metrics: Metrics | None, *, told_to_stop: bool, asked: Wish = NOTHING, at_once: bool
    ) -> Heard:
        """Leave one global batch's numbers, and judge those that are due.

        metrics       None for one that was passed over
        told_to_stop  this rank was
        asked         what this rank found to be asked for; no two find the same
        at_once       judge all there are, this one too: waits for the device
        """
        self._samples[start], self._micro_batches = self._micro_batches, []
        loss, norm = (None, None) if metrics is None else (metrics["train/loss"], metrics["train/grad_norm"])
        self._numbers.send(start, loss, norm, told_to_stop, asked)
        arrived = list(self._numbers.arrived(at_once or (told_to_stop and self._engine.world == 1)))
        stop = any(numbers.votes > 0 for numbers in arrived)
        arrived += self._numbers.arrived(stop)  # nothing is saved unjudged
        wishes = reduce(or_, (numbers.asked for numbers in arrived), NOTHING)
        return Heard([trouble for numbers in arrived if (trouble := self._judged(numbers))], stop, wishes)

    def require_patience(self, trouble: Trouble) -> None:
        """Count a trouble.

        raises  TrainingDiverged where the policy is to stop, or there were too many in a row
        """
        self._in_a_row, self._last_trouble, self._beyond = self._in_a_row + 1, trouble.start, False
        if self.config.policy is Policy.stop:
            raise TrainingDiverged(f"{trouble}. {_ADVICE}; guard.policy=skip or rollback goes on without them")
        if self._in_a_row > self.config.max_in_a_row:
            raise TrainingDiverged(
                f"{trouble}; {self._in_a_row} in a row, guard.max_in_a_row={self.config.max_in_a_row}. {_ADVICE}"
            )

    def clipped(self) -> dict[str, float]:
        """`train/clipped`: of the steps heard of since this was last called, the share whose gradients were clipped."""
        share = self._clipped / max(self._steps, 1)
        self._clipped, self._steps = 0, 0
        return {"train/clipped": share} if self._engine.grad_clip > 0 else {}

    def saved(self) -> None:
        """A checkpoint was written: whatever comes, this much is kept."""
        if self._beyond:
            self._in_a_row = 0

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's state; what is still under way is not judged.

        Checkpoints from before there were guards say nothing of them: what is usual is learned anew.
        """
        self._numbers.forget()
        self._samples = {}
        known = state.get("guard", {})
        self._usual = {name: Usual(**known[name]) if name in known else Usual() for name in self._usual}
        self._clipped, self._steps = known.get("clipped", (0, 0))

    def state(self) -> dict[str, Any]:
        """What a checkpoint must carry as `guard`, so that a resume finds the same spikes."""
        return {**{name: asdict(usual) for name, usual in self._usual.items()}, "clipped": [self._clipped, self._steps]}

    def _see(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook; evaluation is none of its business."""
        if torch.is_grad_enabled():
            first: Tensor = (output.images if isinstance(output, Rebuilt) else output).detach()
            self._outputs.append(first if first.ndim == 1 else first.float().square().flatten(1).mean(1))

    def _judged(self, numbers: "_Read") -> Trouble | None:
        samples = self._samples.pop(numbers.start)
        if numbers.loss is None or numbers.grad_norm is None:
            return None
        values = {"loss": numbers.loss, "gradient norm": numbers.grad_norm}
        if why := self._wrong(values):
            named = _of_all_ranks(_worst(samples, self._engine.rank))
            return Trouble(start=numbers.start, loss=numbers.loss, grad_norm=numbers.grad_norm, why=why, samples=named)
        for name, value in values.items():
            self._usual[name].take(value, self._engine.global_batch, self.config.spike_half_life)
        self._clipped += numbers.grad_norm > self._engine.grad_clip
        self._steps += 1
        self._beyond = numbers.start > self._last_trouble
        if self.config.policy is Policy.skip:
            self._in_a_row = 0
        return None

    def _wrong(self, values: Mapping[str, float]) -> str:
        """What is wrong with a global batch; empty where nothing is."""
        found = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        sigma, half_life = self.config.spike_sigma, self.config.spike_half_life
        for name, value in values.items():
            if value > self._usual[name].limit(sigma, half_life) and math.isfinite(value):
                usual = self._usual[name]
                found.append(f"the {name} is {value:.4g} where {usual.mean:.4g} +- {usual.variance**0.5:.2g} is usual")
        return " and ".join(found)


@dataclass(frozen=True, slots=True)
class _Read:
    """The numbers of one global batch; loss and norm are None where no step was taken on it."""

    start: int
    loss: float | None
    grad_norm: float | None
    votes: float
    asked: Wish


class _Numbers:
    """Numbers on their way from the devices of all ranks to the host, oldest first."""

    def __init__(self, engine: Engine, late: int) -> None:
        self._device, self._world, self._late = engine.device, engine.world, late
        self._under_way: deque[tuple[int, bool, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, start: int, loss: Tensor | None, norm: Tensor | None, vote: bool, asked: Wish) -> None:
        zero = torch.zeros((), device=self._device)
        said = [torch.full((), float(one), device=self._device) for one in (vote, asked)]  # a copy would wait
        numbers = torch.stack([zero if loss is None else loss.float(), zero if norm is None else norm.float(), *said])
        if self._world > 1:
            dist.all_reduce(numbers)
        arrived = None
        if self._device.type == "cuda":
            numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._under_way.append((start, loss is None, numbers, arrived))

    def arrived(self, everything: bool) -> Iterator[_Read]:
        """Those that are due, each once."""
        while len(self._under_way) > (0 if everything else self._late):
            start, passed_over, numbers, event = self._under_way.popleft()
            if event is not None:
                event.synchronize()
            loss, norm, votes, _ = (numbers / self._world).tolist()
            wishes = Wish(int(numbers[3]))
            yield _Read(start, None if passed_over else loss, None if passed_over else norm, votes, wishes)

    def forget(self) -> None:
        self._under_way.clear()


def _worst(samples: Sequence[tuple[list[str], Tensor]], rank: int) -> list[dict[str, Any]]:
    """This rank's samples with the highest values, those that are no number first. Waits for the device."""
    said = [(key, value) for keys, values_B in samples for key, value in zip(keys, values_B.tolist(), strict=True)]
    said.sort(key=_badness, reverse=True)
    return [{"key": key, "value": value, "rank": rank} for key, value in said[:WORST]]


def _badness(said: tuple[str, float]) -> float:
    return said[1] if math.isfinite(said[1]) else math.inf


def _of_all_ranks(mine: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All ranks' samples, worst first."""
    flat = [sample for samples in runtime.gathered(mine) for sample in samples]
    return sorted(flat, key=lambda sample: _badness((sample["key"], sample["value"])), reverse=True)


class GarbageCollection:
    """Collects Python's garbage at stated steps, since ranks that stop at different moments all wait for each other."""

    def __init__(self, every: int) -> None:
        self._every, self._steps = every, 0

    def step(self) -> None:
        self._steps += 1
        if self._every and self._steps % self._every == 0:
            gc.collect()

    @contextmanager
    def scheduled(self) -> Iterator[None]:
        """Python's own collector rests inside; what exists now is never looked at."""
        if not self._every:
            yield
            return
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()
            gc.unfreeze()
