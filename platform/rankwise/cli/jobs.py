"""`rankwise jobs`: what the queue holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from rich.table import Table

from rankwise.cli.output import note, print_json, print_table
from rankwise.jobs.job import JobState
from rankwise.jobs.sql_store import SqlJobStore
from rankwise.settings import Settings

_PAGE = 1000


@click.group()
def jobs() -> None:
    """List, show and cancel jobs."""


@jobs.command("list")
@click.option("--experiment", help="Only jobs of this experiment.")
@click.option(
    "--state", "states", multiple=True, type=click.Choice([str(state) for state in JobState]), help="Only these."
)
@click.option("--limit", type=click.IntRange(min=1), default=_PAGE, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_jobs(experiment: str | None, states: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List jobs, oldest first."""
    with _queue() as queue:
        found = queue.jobs(experiment=experiment, states=[JobState(state) for state in states] or None, limit=limit)
    if as_json:
        print_json([job.to_json() for job in found])
        return
    table = Table(box=None, pad_edge=False)
    for column in ("id", "kind", "state", "experiment", "arm", "tries", "failed", "preempted", "lost", "error"):
        table.add_column(column)
    for job in found:
        counts = (str(count) for count in (job.attempts, job.failures, job.preemptions, job.lost))
        error = (job.error or "").partition("\n")[0]
        table.add_row(str(job.id), job.kind, job.state, job.experiment, job.spec_hash[:12], *counts, error)
    print_table(table)
    if len(found) == limit:
        note(f"only the first {limit} are shown; raise --limit for more")


@jobs.command()
@click.argument("job_id", type=int)
def show(job_id: int) -> None:
    """Show everything about the job JOB_ID, as JSON."""
    with _queue() as queue:
        job = queue.get(job_id)
    print_json({**job.to_json(), "experiment": job.experiment, "result": job.result, "spec": job.spec})


@jobs.command()
@click.argument("job_ids", type=int, nargs=-1, required=True)
def cancel(job_ids: tuple[int, ...]) -> None:
    """Cancel jobs: queued ones at once, running ones after the step under way."""
    with _queue() as queue:
        known = [queue.get(job_id).id for job_id in job_ids]
        for job in queue.cancel(known):
            asked = " (asked to stop)" if job.cancel_requested and not job.ended else ""
            note(f"job {job.id}: {job.state}{asked}")


@contextmanager
def _queue() -> Iterator[SqlJobStore]:
    settings = Settings.load()
    queue = SqlJobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        yield queue
    finally:
        queue.close()
