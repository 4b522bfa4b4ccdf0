"""`rankwise submit`: a definition's jobs into the queue, for workers anywhere to do."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from rankwise.cli.experiment import command_line, definition
from rankwise.cli.output import print_json, print_table
from rankwise.cli.progress import Bars
from rankwise.experiment.loader import load_experiment
from rankwise.experiment.sweep import require_known_arms
from rankwise.settings import Settings


@click.command()
@definition
@click.option("--priority", type=int, default=0, show_default=True, help="Jobs of a higher one are claimed first.")
@click.option("--after", multiple=True, type=int, metavar="JOB", help="Wait until this job has succeeded; repeatable.")
@click.option("--preflight/--no-preflight", default=True, help="Check the rows before anything is queued.")
@click.option("--json", "as_json", is_flag=True, help="Print the jobs as JSON.")
def submit(
    file: Path, overrides: tuple[str, ...], priority: int, after: tuple[int, ...], preflight: bool, as_json: bool
) -> None:
    """Queue all that the experiment FILE asks for and that has not been done yet.

    Doing it again adds nothing. `rankwise worker` does the jobs, `rankwise status` shows how far they are.
    """
    settings = Settings.load()
    # A wrong file is told before anything heavy is imported.
    spec = load_experiment(file, overrides)
    require_known_arms(spec)
    console = Console(stderr=True, highlight=False)
    with Bars(console) as bars:
        from rankwise.tasks.context import open_context
        from rankwise.tasks.rows import RowsCache
        from rankwise.tasks.submit import prepare
        from rankwise.tasks.submit import submit as submit_prepared

        with open_context(settings, bars) as context:
            prepared = prepare(context, spec, RowsCache(settings, bars), preflight=preflight)
            # Once more for jobs that are done: it completes what an earlier submission left out.
            command = command_line(file, overrides)
            submitted = submit_prepared(context, prepared, command=command, priority=priority, after=after)
        waiting = sum(not job.ended for job in submitted.jobs)
        bars.say(
            f"{len(submitted.jobs)} jobs, {waiting} of them to do: rankwise worker does them, rankwise status shows"
        )
    if as_json:
        print_json([job.to_json() for job in submitted.jobs])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("id", "kind", "arm", "state"):
        table.add_column(column)
    for job in submitted.jobs:
        table.add_row(str(job.id), str(job.kind), str(job.spec.get("run_name", job.spec_hash[:12])), str(job.state))
    print_table(table)
