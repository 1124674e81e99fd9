"""Which hosts pass a burn-in: each measured rate beside the median of all hosts, and beside a limit of its own."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm_scale.jobs.burn_in_rates import SLOWDOWNS

_OF_ONE_HOST = ("peak", "products_bf16", "products_fp32", "memory", "read", "write")  # nobody else can end these
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Measure:
    """One rate of a host."""

    name: str
    words: str
    unit: str
    share: float
    """Of the median of all hosts, below which a host fails."""
    least: dict[str, float]
    """Rate below which something is broken, whatever the other hosts do; by kind of device."""
    of_host: Callable[[Iterable[float]], float] = min
    """From the rates of its processes."""


MEASURES = (
    Measure("products_bf16", "bfloat16 products", "FLOP/s", 0.85, {"cuda": 50e12, "cpu": 0.1e9}),
    Measure("products_fp32", "float32 products", "FLOP/s", 0.85, {"cuda": 5e12, "cpu": 0.1e9}),
    Measure("memory", "memory", "B/s", 0.85, {"cuda": 300e9, "cpu": 0.1e9}),
    Measure("reduce_within", "all-reduce in the host", "B/s", 0.85, {"cuda": 5e9, "cpu": 1e6}),
    Measure("gather_within", "all-gather in the host", "B/s", 0.85, {"cuda": 5e9, "cpu": 1e6}),
    Measure("between", "all-reduce with a neighbour", "B/s", 0.85, {"cuda": 1e9, "cpu": 1e6}),
    # File systems are shared and uneven by nature: half the median is a host's own fault.
    Measure("read", "samples read", "/s", 0.5, {"cuda": 10.0, "cpu": 1.0}, sum),
    Measure("write", "written", "B/s", 0.5, {"cuda": 20e6, "cpu": 0.1e6}, sum),
)


@dataclass(slots=True)
class Host:
    """One host, as measured."""

    name: str
    processes: int
    device: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    """Of the median of all hosts."""
    reasons: list[str] = field(default_factory=list)
    """Why it fails; none where it passes."""
    failing: set[str] = field(default_factory=set)
    """Names of the measures that it fails."""
    gpus: list[dict[str, str]] = field(default_factory=list)
    """What nvidia-smi said under load."""


def judge(hosts: Sequence[str], notes: Sequence[Mapping[str, Any]]) -> list[Host]:
    """Every host, in order of ranks.

    hosts  of every rank
    notes  what each rank noted
    """
    found = [
        _host(name, [note for host, note in zip(hosts, notes, strict=True) if host == name])
        for name in dict.fromkeys(hosts)
    ]
    kind = next((str(note["kind"]) for note in notes if "kind" in note), "cpu")
    for measure in MEASURES:
        rates = {host.name: host.rates[measure.name] for host in found if measure.name in host.rates}
        if not rates:
            continue
        median = statistics.median(rates.values())
        for host in (host for host in found if host.name in rates):
            host.shares[measure.name] = rates[host.name] / median
            if reason := _too_slow(measure, rates[host.name], median, kind):
                host.reasons.append(reason)
                host.failing.add(measure.name)
    return found


def _host(name: str, notes: Sequence[Mapping[str, Any]]) -> Host:
    host = Host(name=name, processes=len(notes))
    host.device = next((str(note["device"]) for note in notes if "device" in note), "unknown")
    near = [{**note, "between": max(_neighbours(note))} if _neighbours(note) else note for note in notes]
    for measure in MEASURES:
        rates = [note[measure.name] for note in near if measure.name in note]
        if len(rates) == len(notes):
            host.rates[measure.name] = measure.of_host(rates)
    for local, note in enumerate(notes):
        if "wrong" in note:
            host.reasons.append(f"process {local}: {note['wrong']}")
        if (at := note.get("at", "start")) == "start" or (at in _OF_ONE_HOST and at not in note):
            host.reasons.append(f"process {local} ended or hung at {at}")
        host.gpus += note.get("gpus", [])
    host.reasons += [reason for gpu in host.gpus for reason in _ailing(gpu)]
    return host


def _neighbours(note: Mapping[str, Any]) -> list[float]:
    """Rates with each neighbour: the better one counts, for the other may be the neighbour's fault."""
    return [rate for name, rate in note.items() if name.startswith("neighbour_")]


def _too_slow(measure: Measure, rate: float, median: float, kind: str) -> str:
    said = f"{measure.words} {shown(rate, measure.unit)}"
    if rate < measure.least[kind]:
        return f"{said}, under the limit of {shown(measure.least[kind], measure.unit)}"
    if rate < measure.share * median:
        return f"{said}, {rate / median:.2f} of the median (at least {measure.share})"
    return ""


def _ailing(gpu: Mapping[str, str]) -> list[str]:
    name, errors = f"GPU {gpu['index']}", gpu["ecc.errors.uncorrected.volatile.total"]
    found = [f"{name}: {errors} uncorrected ECC errors"] if errors.isdigit() and int(errors) else []
    slow = [reason for reason in SLOWDOWNS if gpu[reason] == "Active"]
    if slow:
        at = f"{gpu['clocks.sm']} of {gpu['clocks.max.sm']} MHz, {gpu['temperature.gpu']} C"
        found.append(f"{name}: {', '.join(slow)} at {at}")
    return found


def shown(rate: float, unit: str) -> str:
    """A rate in three digits."""
    size, prefix = next((one for one in _PREFIXES if rate >= one[0]), (1.0, ""))
    return f"{rate / size:.3g} {prefix}{unit}"


def exclude(hosts: Iterable[Host]) -> str:
    """Hosts that fail, one a line with the reasons after it, as `--exclude` lists are read."""
    return "".join(f"{host.name}  # {'; '.join(host.reasons)}\n" for host in hosts if host.reasons)
