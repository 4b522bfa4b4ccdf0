"""`rankwise jobs`: what the queue holds, and what a person does about it."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from rankwise.cli.job_log import follow, tail
from rankwise.cli.output import note, print_json, print_table
from rankwise.cli.queue import open_queue
from rankwise.exceptions import JobError
from rankwise.jobs.job import ENDED, Attempt, Job, JobKind, JobState
from rankwise.jobs.store import JobStore
from rankwise.logs import human, job_log_path
from rankwise.settings import Settings

_PAGE = 1000
_TAIL = 20
_ids = click.argument("job_ids", type=int, nargs=-1)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def jobs() -> None:
    """List and show jobs, cancel them, try them again, read their logs."""


@jobs.command("list")
@click.option("--experiment", help="Only jobs of this experiment.")
@click.option(
    "--state", "states", multiple=True, type=click.Choice([str(state) for state in JobState]), help="Only these."
)
@click.option("--kind", "kinds", multiple=True, type=click.Choice([str(kind) for kind in JobKind]), help="Only these.")
@click.option("--limit", type=click.IntRange(min=1), default=_PAGE, show_default=True, help="At most so many.")
@click.option("--after", type=int, default=0, help="Only jobs with a larger id: the next page.")
@_json
def list_jobs(
    experiment: str | None, states: tuple[str, ...], kinds: tuple[str, ...], limit: int, after: int, as_json: bool
) -> None:
    """List jobs, oldest first."""
    with open_queue() as queue:
        found = queue.jobs(
            experiment=experiment,
            states=[JobState(state) for state in states] or None,
            kinds=[JobKind(kind) for kind in kinds] or None,
            limit=limit,
            after_id=after,
        )
        time = queue.time()
    if as_json:
        print_json([job.to_json() for job in found])
    else:
        _print_jobs(found, time)
    if len(found) == limit:
        note(f"only {limit} are shown; raise --limit for more, or go on with --after {found[-1].id}")


@jobs.command()
@click.argument("job_id", type=int)
@_json
def show(job_id: int, as_json: bool) -> None:
    """Show everything about the job JOB_ID: its attempts, what it waits for, the end of its log."""
    settings = Settings.load()
    with open_queue(settings) as queue:
        job, attempts, earlier = queue.get(job_id), queue.attempts(job_id), queue.waits_for(job_id)
        time = queue.time()
    path = job_log_path(settings, job_id)
    last = tail(path, _TAIL) if path.exists() else []
    if as_json:
        print_json({**_everything(job, attempts, earlier), "log": [_parsed(line) for line in last]})
        return
    _print_job(job, attempts, earlier, time)
    for line in last:
        click.echo(human(line))


@jobs.command()
@_ids
@click.option("--experiment", help="All jobs of this experiment that have not ended.")
@_json
def cancel(job_ids: tuple[int, ...], experiment: str | None, as_json: bool) -> None:
    """Cancel jobs: queued ones at once, running ones after the step under way."""
    with open_queue() as queue:
        changed = queue.cancel(_named(queue, job_ids, experiment, set(JobState) - ENDED))
    _tell(changed, as_json)


@jobs.command()
@_ids
@click.option("--experiment", help="All jobs of this experiment that have failed.")
@_json
def retry(job_ids: tuple[int, ...], experiment: str | None, as_json: bool) -> None:
    """Put failed and cancelled jobs back into the queue, and what was cancelled because of them."""
    with open_queue() as queue:
        changed = queue.retry(_named(queue, job_ids, experiment, {JobState.FAILED}))
    _tell(changed, as_json)


@jobs.command()
@click.argument("job_id", type=int)
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the job has ended.")
@click.option("-n", "--lines", type=click.IntRange(min=1), help="Only the last so many.")
@click.option("--json", "as_json", is_flag=True, help="Print the lines as they are: one JSON object each.")
def logs(job_id: int, following: bool, lines: int | None, as_json: bool) -> None:
    """Print the log of the job JOB_ID."""
    settings = Settings.load()
    with open_queue(settings) as queue:
        job = queue.get(job_id)
        path = job_log_path(settings, job_id)
        if not path.exists() and (job.ended or not following):
            raise JobError(_no_log(job, path, queue.attempts(job_id)))
        for line in follow(path, lines, lambda: not following or queue.get(job_id).ended):
            click.echo(line if as_json else human(line))


def _no_log(job: Job, path: Path, attempts: Sequence[Attempt]) -> str:
    if not attempts:
        return f"{job.title} has no log: no worker has started it yet"
    hosts = ", ".join(sorted({attempt.host for attempt in attempts}))
    return f"{job.title} has no log at {path}: it ran on {hosts}; look in RANKWISE_HOME there, or share that directory"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _named(queue: JobStore, ids: Sequence[int], experiment: str | None, states: Collection[JobState]) -> list[int]:
    """The jobs that a command is about: those with these numbers, or those of an experiment in these states."""
    if bool(ids) == (experiment is not None):
        raise click.UsageError("give the numbers of jobs, or --experiment NAME")
    if experiment is None:
        return [queue.get(job_id).id for job_id in ids]
    found: list[int] = []
    while page := queue.jobs(experiment=experiment, states=states, limit=_PAGE, after_id=found[-1] if found else 0):
        found += [job.id for job in page]
    if not found:
        said = " or ".join(sorted(states))
        raise JobError(f"no job of experiment {experiment!r} is {said}; `rankwise jobs list` shows those there are")
    return found


def _state(job: Job, time: float | None = None) -> str:
    """The state in words; `time` is now, for a job that waits after a failure or an outage."""
    if job.held and job.state is JobState.QUEUED:
        return f"{job.state} (held)"
    if time is not None and job.state is JobState.QUEUED and job.not_before > time:
        return f"{job.state} (again in {job.not_before - time:.0f} s)"
    return f"{job.state} (asked to stop)" if job.cancel_requested and not job.ended else str(job.state)


def _tell(changed: Sequence[Job], as_json: bool) -> None:
    if as_json:
        print_json([job.to_json() for job in changed])
    for job in changed if not as_json else ():
        note(f"job {job.id}: {_state(job)}" + (f": {job.error}" if job.error else ""))


def _everything(job: Job, attempts: Sequence[Attempt], earlier: Sequence[Job]) -> dict[str, Any]:
    return {
        **job.to_json(),
        "experiment": job.experiment,
        "priority": job.priority,
        "lost": job.lost,
        "held": job.held,
        "cancel_requested": job.cancel_requested,
        "cancelled_by": job.cancelled_by,
        "checkpoint": job.checkpoint,
        "pack_id": job.pack_id,
        "not_before": job.not_before,
        "created_at": job.created_at,
        "updated_at": job.updated_at,
        "waits_for": [each.id for each in earlier],
        "history": [attempt.to_json() for attempt in attempts],
        "result": job.result,
        "spec": job.spec,
    }


def _print_jobs(found: Sequence[Job], time: float) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("id", "kind", "state", "experiment", "arm", "tries", "failed", "preempted", "lost", "error"):
        table.add_column(column)
    for job in found:
        counts = (str(count) for count in (job.attempts, job.failures, job.preemptions, job.lost))
        error = (job.error or "").partition("\n")[0]
        table.add_row(str(job.id), job.kind, _state(job, time), job.experiment, job.spec_hash[:12], *counts, error)
    print_table(table)


def _print_job(job: Job, attempts: Sequence[Attempt], earlier: Sequence[Job], time: float) -> None:
    click.echo(f"{job.title} of {job.experiment}: {_state(job, time)}")
    for each in earlier:
        click.echo(f"waits for {each.title}, which is {each.state}")
    if job.error:
        click.echo(f"error: {job.error}")
    if job.result is not None:
        click.echo(f"result: {json.dumps(job.result, ensure_ascii=False)}")
    for attempt in attempts:
        end = "goes on" if attempt.ended_at is None else f"{attempt.outcome} after {_seconds(attempt)}"
        step = f", step {attempt.progress['step']}" if attempt.progress and "step" in attempt.progress else ""
        error = f": {attempt.error}" if attempt.error else ""
        click.echo(f"attempt {attempt.number} by {attempt.worker}{step}: {end}{error}")


def _seconds(attempt: Attempt) -> str:
    assert attempt.ended_at is not None
    return f"{attempt.ended_at - attempt.started_at:.1f} s"
