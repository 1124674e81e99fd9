"""`burn_in.html`: every host's rates and every check on one page that opens without a server, in the report's style."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources

from ldm_scale.jobs.burn_in_verdict import MEASURES, Host, shown
from ldm_scale.jobs.preflight import Check

_GPU = {
    "index": "GPU", "name": "", "ecc.errors.uncorrected.volatile.total": "uncorrected ECC", "clocks.sm": "MHz",
    "clocks.max.sm": "of MHz", "temperature.gpu": "C",
}  # fmt: skip


def page(
    training: str, facts: Mapping[str, str], hosts: Sequence[Host], checks: Sequence[Check], following: Sequence[str]
) -> str:
    """The page.

    training   which it was, in words
    facts      in words, by name
    following  commands to type next
    """
    css = (resources.files("ldm_scale.tracking") / "page" / "report.css").read_text("utf-8")
    passed = is_passed(hosts, checks)
    state = '<span class="state finished">passed</span>' if passed else '<span class="state failed">failed</span>'
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    sections = [
        f'<div class="top"><h1>Burn-in<small>{escape(training)}</small></h1>{state}</div><p></p>',
        f'<dl class="facts">{listed}</dl>',
        f"<h2>Hosts</h2>{_failing(hosts)}{_hosts(hosts)}",
        "<p class='soft'>Each rate with its share of the median of all hosts. Rates of arithmetic, memory and "
        "collectives are those of a host's slowest process; reading and writing are added up.</p>",
        f"<h2>Training</h2>{_checks(checks)}",
        f"<h2>GPUs under load</h2>{_gpus(hosts)}" if any(host.gpus for host in hosts) else "",
        f"<h2>Next</h2><pre>{escape(chr(10).join(following))}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>Burn-in: {"passed" if passed else "failed"}</title>'
    scheme = '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
    own = "tr.failed td:first-child, td.failed { color: var(--bad); font-weight: 600; }"
    style = f"<style>{css}{own}</style>"
    return f'<!doctype html><html lang="en"><head>{head}{scheme}{style}</head><body>{"".join(sections)}</body></html>\n'


def is_passed(hosts: Iterable[Host], checks: Iterable[Check]) -> bool:
    """Whether nothing failed."""
    return not any(host.reasons for host in hosts) and all(check.state == "ok" for check in checks)


def _hosts(hosts: Sequence[Host]) -> str:
    measured = [measure for measure in MEASURES if any(measure.name in host.rates for host in hosts)]
    rows = []
    for host in sorted(hosts, key=lambda host: not host.reasons):
        cells = [_cell(host.name), _cell("failed" if host.reasons else "passed"), _number(str(host.processes))]
        for measure in measured:
            said = "-"
            if (rate := host.rates.get(measure.name)) is not None:
                said = f"{shown(rate, measure.unit)} <span class='soft'>{host.shares[measure.name]:.2f}</span>"
            cells.append(_number(said, failed=measure.name in host.failing))
        rows.append((bool(host.reasons), cells))
    return _table(["host", "", "processes", *(measure.words for measure in measured)], rows)


def _failing(hosts: Sequence[Host]) -> str:
    rows = [
        (True, [_cell(host.name), f"<td class='wrap'>{escape('; '.join(host.reasons))}</td>"])
        for host in hosts
        if host.reasons
    ]
    return _table(["failing host", "why"], rows) + "<p></p>" if rows else ""


def _checks(checks: Sequence[Check]) -> str:
    rows = [
        (check.state == "fails", [_cell(check.name), _cell(check.state), f"<td class='wrap'>{escape(check.said)}</td>"])
        for check in checks
    ]
    return _table(["check", "", "found"], rows)


def _gpus(hosts: Sequence[Host]) -> str:
    rows = [(False, [_cell(host.name), *(_cell(gpu[key]) for key in _GPU)]) for host in hosts for gpu in host.gpus]
    return _table(["host", *_GPU.values()], rows)


def _table(head: Sequence[str], rows: Iterable[tuple[bool, Sequence[str]]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr class='{'failed' if failed else ''}'>{''.join(cells)}</tr>" for failed, cells in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _number(html: str, *, failed: bool = False) -> str:
    return f"<td class='number{' failed' if failed else ''}'>{html}</td>"
