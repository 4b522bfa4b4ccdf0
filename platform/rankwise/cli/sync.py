"""`rankwise sync`: bring MLflow up to what the queue and the outboxes know."""

from __future__ import annotations

import click
from rich.console import Console

from rankwise.cli.output import note, print_json
from rankwise.cli.progress import Bars
from rankwise.exceptions import TrackingError
from rankwise.settings import Settings


@click.command()
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=300.0, show_default=True, help="Seconds for the outbox."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def sync(timeout: float, as_json: bool) -> int:
    """Deliver what MLflow has missed, finish sweeps, and remove model versions that no job counts as its result.

    Points, parameters, texts and files that could not be sent wait in the outbox of RANKWISE_HOME, also those of
    processes that have died; each is delivered once, with its own time. Exit code 1 says that something still waits or
    needs a look, 3 that MLflow does not answer.
    """
    # Late: MLflow takes seconds to import.
    from rankwise.tasks.context import open_context
    from rankwise.tasks.sync import synchronize

    with Bars(Console(stderr=True, highlight=False)) as bars, open_context(Settings.load(), bars) as context:
        synced = synchronize(context, timeout=timeout)
    code = TrackingError.exit_code if synced.error else 0 if synced.complete else 1
    if as_json:
        print_json(synced.to_json())
        return code
    for run_id in synced.outbox.delivered:
        click.echo(f"delivered: run {run_id}")
    for uri in synced.removed:
        click.echo(f"removed: {uri}, registered twice")
    for run_id, status in synced.ended.items():
        click.echo(f"ended: run {run_id} is {status}, as its job")
    for run_id in synced.finished:
        click.echo(f"finished: the sweep of run {run_id} has its comparison")
    for run_id, reason in synced.outbox.waiting.items():
        note(f"waiting: run {run_id}: {reason}")
    for uri, reason in synced.kept.items():
        note(f"kept: {uri}: {reason}")
    for problem in (*synced.outbox.problems, *synced.refused):
        note(f"to look at: {problem}")
    if synced.error:
        note(f"error: {synced.error}")
    if synced.complete:
        note("MLflow has everything")
    return code
