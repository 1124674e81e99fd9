"""The dashboard on W&B: a workspace with the panels of docs/dashboard.md in their order, of the names that a run logs.

    python -m ldm_scale.jobs.dashboard RUN [--out FILE]     save it as a view of the run's project; offline, write FILE
    python -m ldm_scale.jobs.dashboard --table              the table of docs/dashboard.md

A view shows every run of its project. Make it again when runs log more names: each time it is a new view.
"""

import argparse
import itertools
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_scale.core import storage
from ldm_scale.core.run_dir import RunDir
from ldm_scale.tracking.panels import PANELS, layout, section
from ldm_scale.tracking.weights_and_biases import may_go_online, shown_picture

if TYPE_CHECKING:
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces.reports.v2 import interface as reports

_AXIS = "train/images_seen"
_HOURS = "perf/hours"
_SPEED = "E. Speed"


def logged(run_dir: RunDir) -> set[str]:
    """What W&B is sent of a run: names of numbers and of pictures, and `events/KIND`.

    raises  FileNotFoundError where nothing was logged
    """
    numbers = {name for line in run_dir.read_metrics() for name in line} - {"images_seen", "time"}
    if not numbers:
        raise FileNotFoundError(f"{run_dir.metrics} has no numbers yet; give the directory of a run that trains")
    pictures = {shown_picture(folder.name.replace("__", "/")) for folder in run_dir.media.glob("*")}
    return numbers | pictures | {f"events/{line['event']}" for line in run_dir.read_events()}


def workspace(names: Collection[str], *, entity: str, project: str) -> "workspaces.Workspace":
    """The workspace that shows `names`; the speed panels once more over hours."""
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces.reports.v2 import interface as reports

    def drawn(title: str, own: list[str], x: str) -> "reports.LinePlot | reports.MediaBrowser":
        if own[0].startswith("samples/"):
            return reports.MediaBrowser(title=title, media_keys=own)
        return reports.LinePlot(title=title, x=x, y=[*own])

    filled = layout(set(names) - {_AXIS})
    sections = []
    for title, panels in itertools.groupby(filled, key=lambda pair: section(pair[0])):
        shown = [(panel.heading, own) for panel, own in panels]
        for name, x in [(title, _AXIS), *([(f"{title}, over hours", _HOURS)] if title == _SPEED else [])]:
            sections.append(
                workspaces.Section(name=name, panels=[drawn(*pair, x) for pair in shown], is_open=x == _AXIS)
            )
    configuration = workspaces.Section(name="G. Configuration", panels=[reports.RunComparer(diff_only="split")])
    return workspaces.Workspace(
        name="ldm_scale",
        entity=entity,
        project=project,
        sections=[*sections, configuration],
        settings=workspaces.WorkspaceSettings(x_axis=_AXIS),
    )


def show(run_dir: RunDir, out: Path) -> str:
    """Save the workspace of a run's project on W&B, or write it to `out` where there is no key or no network.

    returns  what to tell the user
    raises   FileNotFoundError as `logged`; ValueError where wandb-workspaces is not installed
    """
    import wandb

    names, told = logged(run_dir), storage.read_json(run_dir.config)["tracker"]
    online = may_go_online(wandb.setup().settings)
    entity = told["entity"] or (wandb.Api().default_entity if online else None) or "ENTITY"
    try:
        made = workspace(names, entity=entity, project=told["project"])
    except ModuleNotFoundError as error:
        raise ValueError(f"{error}: pip install 'ldm_scale[dashboard]'") from error
    if online:
        made.save()
        return made.url
    spec = made._to_model().spec  # the package checks and shows what it sends in no other way
    out.write_text(spec.model_dump_json(by_alias=True, exclude_none=True, indent=1))
    again = f"python -m ldm_scale.jobs.dashboard {run_dir.path}"
    return f"{out}: {len(names)} names\nno key or no network; where there are both, after `wandb login`:  {again}"


def table() -> str:
    """The panels as a Markdown table."""
    rows = []
    for panel in PANELS:
        names = ", ".join(f"`{name}`" for name in panel.names) or "-"
        rows.append(f"| {panel.heading} | {names} | {panel.act_when} | {panel.note} |")
    return "\n".join(["| panel | names | act when | logged by, or shown in |", "|---|---|---|---|", *rows, ""])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ldm_scale.jobs.dashboard", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", type=Path, nargs="?", help="run directory")
    what.add_argument("--table", action="store_true", help="print the panels as a table")
    parser.add_argument("--out", type=Path, default=Path("dashboard.json"), help="where offline (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(table(), end="")
        return 0
    try:
        print(show(RunDir(arguments.run), arguments.out))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
