"""`rankwise doctor`: what is wrong here, and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import click
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rankwise import __version__
from rankwise.cli.output import print_json, show, waiting
from rankwise.settings import Settings
from rankwise.tasks.doctor.checks import CHECKS
from rankwise.tasks.doctor.examine import examine, worst
from rankwise.tasks.doctor.finding import Finding, State

_MARKS = {
    State.OK: ("✓", "green"),
    State.SKIPPED: ("-", "dim"),
    State.WARNING: ("!", "yellow"),
    State.PROBLEM: ("✗", "bold red"),
}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Look at this machine, the queue, MLflow, its artifact store, the hub and Ray, and say what to do.

    Exit code 1 with a problem; warnings are for people. One small artifact is written, read and deleted.
    """
    settings = Settings.load()
    if as_json:
        findings = examine(settings, CHECKS)
        print_json(
            {
                "rankwise": __version__,
                "state": str(worst(findings)),
                "findings": [finding.to_json() for finding in findings],
            }
        )
    else:
        with waiting("Looking ..."):
            findings = examine(settings, CHECKS)
        show(lambda console: _drawn(findings))
    return 1 if worst(findings) is State.PROBLEM else 0


def _drawn(findings: Sequence[Finding]) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.state]
        text = Text(finding.seen, style="dim" if finding.state is State.SKIPPED else "")
        if finding.advice:
            text.append(f"\n→ {finding.advice}", style=style if style != "dim" else "")
        table.add_row(Text(mark, style=style), Text(finding.name, style=style), text)
    counts = Counter(finding.state for finding in findings)
    words = {
        State.PROBLEM: "problem" if counts[State.PROBLEM] == 1 else "problems",
        State.WARNING: "warning" if counts[State.WARNING] == 1 else "warnings",
        State.OK: "ok",
        State.SKIPPED: "skipped",
    }
    summary = ", ".join(f"{counts[state]} {word}" for state, word in words.items())
    return Group(table, Padding(Text(summary), (1, 0, 0, 0)))
