"""`rankwise jobs` and `rankwise status`: show, cancel and retry jobs, read their logs, summarize the queue."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from rankwise.cli.output import note, print_json, print_table
from rankwise.exceptions import JobError, JobStoreError
from rankwise.jobs.database import has_queue
from rankwise.jobs.job import ENDED, Attempt, Job, JobKind, JobState, WorkerInfo
from rankwise.jobs.queries import packs, remaining_seconds
from rankwise.jobs.store import JobStore, every_job
from rankwise.logs import format_line, job_log_path
from rankwise.settings import Settings
from rankwise.worker.local_placer import host_name

if TYPE_CHECKING:
    from rankwise.evaluation.compare import Comparison
    from rankwise.tracking.store import Store

_POLL_S = 0.3


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, maxlen=lines)]


def follow(path: Path, lines: int | None, ended: Callable[[], bool]) -> Iterator[str]:
    """Yield the lines of a log, then lines that are appended until `ended()`; wait for a log that does not exist yet.

    `lines` limits how many of the present lines are yielded. `ended` is called before the rest of the file is read, so
    no line is lost.
    """
    while not path.exists():
        if ended():
            return
        time.sleep(_POLL_S)
    with path.open(encoding="utf-8", errors="replace") as file:
        kept = deque(file, maxlen=lines)
        part = kept.pop() if kept and not kept[-1].endswith("\n") else ""
        yield from (line.rstrip("\n") for line in kept)
        while True:
            last = ended()
            for line in file:
                part += line
                if part.endswith("\n"):
                    yield part.rstrip("\n")
                    part = ""
            if last:
                break
            time.sleep(_POLL_S)
    if part:
        yield part


@contextmanager
def open_queue(settings: Settings | None = None) -> Iterator[JobStore]:
    """Open the queue, and create or upgrade its database.

    Raises:
        JobStoreError: The database cannot be used.
    """
    settings = settings or Settings.load()
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        yield queue
    finally:
        queue.close()


def add_queued_arms(settings: Settings, store: Store, comparison: Comparison, *, everything: bool) -> Comparison:
    """Add queued arms to a comparison; without a usable queue, print a note and return the comparison unchanged.

    Raises:
        TrackingError: The store cannot be reached.
    """
    from rankwise.tasks.sweep_lifecycle import with_queued_arms

    reason = "the database (RANKWISE_DATABASE_URL, by default in RANKWISE_HOME) has no queue yet"
    try:
        if has_queue(settings.database_url):
            with open_queue(settings) as queue:
                return with_queued_arms(store, queue, comparison, everything=everything)
    except JobStoreError as error:
        reason = str(error)
    note(f"queued arms are not shown: {reason}")
    return comparison


_PAGE = 1000
_TAIL = 20
_ids = click.argument("job_ids", type=int, nargs=-1)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def jobs() -> None:
    """List, show, cancel and retry jobs, and read their logs."""


@jobs.command("list")
@click.option("--experiment", help="Only jobs of this experiment.")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([str(state) for state in JobState]),
    help="Only these; repeatable.",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    type=click.Choice([str(kind) for kind in JobKind]),
    help="Only these; repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), default=_PAGE, show_default=True, help="Maximum number of jobs.")
@click.option("--after", type=int, default=0, help="Only jobs with a larger id, for the next page.")
@_json
def list_jobs(
    experiment: str | None, states: tuple[str, ...], kinds: tuple[str, ...], limit: int, after: int, as_json: bool
) -> None:
    """List jobs, oldest first."""
    with open_queue() as queue:
        selected = queue.jobs(
            experiment=experiment,
            states=[JobState(state) for state in states] or None,
            kinds=[JobKind(kind) for kind in kinds] or None,
            limit=limit,
            after_id=after,
        )
        time = queue.time()
    if as_json:
        print_json({"jobs": [job.to_json() for job in selected]})
    else:
        _print_jobs(selected, time)
    if len(selected) == limit:
        note(f"only {limit} jobs are shown; raise --limit, or continue with --after {selected[-1].id}")


@jobs.command()
@click.argument("job_id", type=int)
@_json
def show(job_id: int, as_json: bool) -> None:
    """Show the job JOB_ID: its attempts, the jobs it waits for, the end of its log."""
    settings = Settings.load()
    with open_queue(settings) as queue:
        job, attempts, dependencies = queue.get(job_id), queue.attempts(job_id), queue.waits_for(job_id)
        time = queue.time()
    path = job_log_path(settings, job_id)
    last = tail(path, _TAIL) if path.exists() else []
    if as_json:
        print_json({**_job_details(job, attempts, dependencies), "log": [_parse_line(line) for line in last]})
        return
    _print_job(job, attempts, dependencies, time)
    for line in last:
        click.echo(format_line(line))


@jobs.command()
@_ids
@click.option("--experiment", help="All jobs of this experiment that have not ended.")
@_json
def cancel(job_ids: tuple[int, ...], experiment: str | None, as_json: bool) -> None:
    """Cancel jobs: queued ones at once, running ones after the current step."""
    with open_queue() as queue:
        changed = queue.cancel(_select_jobs(queue, job_ids, experiment, set(JobState) - ENDED))
    _print_changes(changed, as_json)


@jobs.command()
@_ids
@click.option("--experiment", help="All jobs of this experiment that have failed.")
@_json
def retry(job_ids: tuple[int, ...], experiment: str | None, as_json: bool) -> None:
    """Requeue failed and cancelled jobs, and the jobs cancelled because of them."""
    with open_queue() as queue:
        changed = queue.retry(_select_jobs(queue, job_ids, experiment, {JobState.FAILED}))
    _print_changes(changed, as_json)


@jobs.command()
@click.argument("job_id", type=int)
@click.option("-f", "--follow", "following", is_flag=True, help="Print new lines until the job ends.")
@click.option("-n", "--lines", type=click.IntRange(min=1), help="Only this many of the last lines.")
@click.option("--json", "as_json", is_flag=True, help="Print raw lines, one JSON object each.")
def logs(job_id: int, following: bool, lines: int | None, as_json: bool) -> None:
    """Print the log of the job JOB_ID."""
    settings = Settings.load()
    with open_queue(settings) as queue:
        job = queue.get(job_id)
        path = job_log_path(settings, job_id)
        if not path.exists() and (job.ended or not following):
            raise JobError(_no_log(job, path, queue.attempts(job_id)))
        for line in follow(path, lines, lambda: not following or queue.get(job_id).ended):
            click.echo(line if as_json else format_line(line))


def _no_log(job: Job, path: Path, attempts: Sequence[Attempt]) -> str:
    if not attempts:
        return f"{job.title} has no log: no worker has started it yet"
    hosts = ", ".join(sorted({attempt.host for attempt in attempts}))
    return f"{job.title} has no log at {path}: it ran on {hosts}; look in RANKWISE_HOME there, or share that directory"


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _select_jobs(
    queue: JobStore, ids: Sequence[int], experiment: str | None, states: Collection[JobState]
) -> list[int]:
    """The ids of the given jobs, or of an experiment's jobs in these states."""
    if bool(ids) == (experiment is not None):
        raise click.UsageError("give job ids, or --experiment NAME")
    if experiment is None:
        return [queue.get(job_id).id for job_id in ids]
    selected = [job.id for job in every_job(queue, experiment=experiment, states=states)]
    if not selected:
        allowed = " or ".join(sorted(states))
        raise JobError(f"experiment {experiment!r} has no job that is {allowed}; see `rankwise jobs list`")
    return selected


def _describe_state(job: Job, time: float | None = None) -> str:
    """The state in words; `time` is the queue's present time, for the delay before the next attempt."""
    if job.held and job.state is JobState.QUEUED:
        return f"{job.state} (held)"
    if time is not None and job.state is JobState.QUEUED and job.not_before > time:
        return f"{job.state} (retry in {job.not_before - time:.0f} s)"
    return f"{job.state} (stopping)" if job.cancel_requested and not job.ended else str(job.state)


def _print_changes(changed: Sequence[Job], as_json: bool) -> None:
    if as_json:
        print_json({"jobs": [job.to_json() for job in changed]})
    for job in changed if not as_json else ():
        note(f"job {job.id}: {_describe_state(job)}" + (f": {job.error}" if job.error else ""))


def _job_details(job: Job, attempts: Sequence[Attempt], dependencies: Sequence[Job]) -> dict[str, Any]:
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
        "waits_for": [dependency.id for dependency in dependencies],
        "history": [attempt.to_json() for attempt in attempts],
        "result": job.result,
        "spec": job.spec,
    }


def _print_jobs(selected: Sequence[Job], time: float) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("id", "kind", "state", "experiment", "arm", "tries", "failed", "preempted", "lost", "error"):
        table.add_column(column)
    for job in selected:
        counts = (str(count) for count in (job.attempts, job.failures, job.preemptions, job.lost))
        error = (job.error or "").partition("\n")[0]
        table.add_row(
            str(job.id), job.kind, _describe_state(job, time), job.experiment, job.spec_hash[:12], *counts, error
        )
    print_table(table)


def _print_job(job: Job, attempts: Sequence[Attempt], dependencies: Sequence[Job], time: float) -> None:
    click.echo(f"{job.title} of {job.experiment}: {_describe_state(job, time)}")
    for dependency in dependencies:
        click.echo(f"waits for {dependency.title}, which is {dependency.state}")
    if job.error:
        click.echo(f"error: {job.error}")
    if job.result is not None:
        click.echo(f"result: {json.dumps(job.result, ensure_ascii=False)}")
    for attempt in attempts:
        end = "running" if attempt.ended_at is None else f"{attempt.outcome} after {_seconds(attempt)}"
        step = f", step {attempt.progress['step']}" if attempt.progress and "step" in attempt.progress else ""
        error = f": {attempt.error}" if attempt.error else ""
        click.echo(f"attempt {attempt.number} by {attempt.worker}{step}: {end}{error}")


def _seconds(attempt: Attempt) -> str:
    assert attempt.ended_at is not None
    return f"{attempt.ended_at - attempt.started_at:.1f} s"


# Workers send heartbeats more often than this.
_SILENT_S = 120.0


@click.command()
@click.option("--experiment", help="Only jobs of this experiment.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--alive", is_flag=True, help="Exit with 1 unless a worker of this host is alive, for health probes.")
def status(experiment: str | None, as_json: bool, alive: bool) -> int:
    """Show the number of jobs in each state, the workers, their work, and the estimated time left."""
    with open_queue() as queue:
        if alive:
            return _probe(queue.workers())
        summary = _queue_status(queue, experiment)
    if as_json:
        print_json(summary)
    else:
        _print_status(summary)
    return 0


def _probe(workers: Sequence[WorkerInfo]) -> int:
    """Exit code of a container's health probe."""
    here = host_name()
    mine = [worker for worker in workers if worker.host == here]
    if any(worker.silent <= _SILENT_S for worker in mine):
        return 0
    if mine:
        note(f"no sign of life from a worker of {here} for {_format_duration(min(worker.silent for worker in mine))}")
    else:
        note(f"no worker of {here} is registered in the queue")
    return 1


def _queue_status(queue: JobStore, experiment: str | None) -> dict[str, Any]:
    time, depth, attempts = queue.time(), queue.depth(experiment), queue.open_attempts()
    jobs = {job.id: job for job in queue.jobs(ids=[attempt.job_id for attempt in attempts], experiment=experiment)}
    known = [attempt for attempt in attempts if attempt.job_id in jobs]
    running = {kind: [attempt for attempt in known if jobs[attempt.job_id].kind is kind] for kind in JobKind}
    eta = {
        str(kind): remaining_seconds(
            queued=depth[kind, JobState.QUEUED], running=running[kind], recent=queue.recent(kind), time=time
        )
        for kind in JobKind
    }
    return {
        "jobs": {str(kind): {str(state): depth[kind, state] for state in JobState} for kind in JobKind},
        "held": queue.held(experiment),
        "workers": [_worker_details(worker) for worker in queue.workers()],
        "packs": [pack.to_json() for pack in packs(jobs, attempts, time)],
        "eta_seconds": eta,
    }


def _worker_details(worker: WorkerInfo) -> dict[str, Any]:
    return {
        "name": worker.name,
        "host": worker.host,
        "pid": worker.pid,
        "started_at": worker.started_at,
        "silent": worker.silent,
        **worker.info,
    }


def _print_status(summary: dict[str, Any]) -> None:
    states = Table(box=None, pad_edge=False)
    for column in ("kind", *JobState, "done in"):
        states.add_column(column, justify="left" if column == "kind" else "right")
    for kind, counts in summary["jobs"].items():
        if any(counts.values()):
            states.add_row(kind, *map(str, counts.values()), _format_duration(summary["eta_seconds"][kind]))
    if states.row_count:
        print_table(states)
    else:
        click.echo("no jobs")
    if summary["held"]:
        click.echo(f"{summary['held']} queued jobs are held until their rung is complete")
    for pack in summary["packs"]:
        click.echo(_pack_line(pack))
    for worker in summary["workers"]:
        click.echo(_worker_line(worker))
    if not summary["workers"] and any(counts["queued"] for counts in summary["jobs"].values()):
        note("no workers: start one with `rankwise worker`")


def _pack_line(pack: dict[str, Any]) -> str:
    jobs = pack["jobs"]
    parts = [f"{pack['kind']} of {pack['experiment']}: {len(jobs)} jobs ({_format_ids(jobs)}) by {pack['worker']}"]
    parts += [pack["phase"]] if pack["phase"] else []
    parts += [f"step {pack['step']} of {pack['steps']}"] if pack["steps"] else []
    parts += [f"{pack['tokens_per_second']:.0f} tokens/s"] if pack["tokens_per_second"] else []
    parts.append(f"for {_format_duration(pack['seconds'])}")
    parts += [f"no progress for {_format_duration(pack['silent'])}"] if (pack["silent"] or 0) > _SILENT_S else []
    return ", ".join(parts)


def _format_ids(jobs: list[int]) -> str:
    return ", ".join(map(str, jobs[:4])) + (", ..." if len(jobs) > 4 else "")


def _worker_line(worker: dict[str, Any]) -> str:
    parts = [f"worker {worker['name']}"] + [str(worker[key]) for key in ("device", "state") if worker.get(key)]
    parts += [f"silent for {_format_duration(worker['silent'])}"] if worker["silent"] > _SILENT_S else []
    return ", ".join(parts)


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
