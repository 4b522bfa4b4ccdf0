"""`rankwise jobs`: what the queue holds, and what a person does about it.

- Reading a job's log: JSON lines that its worker appends.
- The queue, as commands open it.
- `rankwise status`: the queue at one look.
"""

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
    """The lines of a log, and those that are appended until `ended`.

    Args:
        path: The log; one that is not there yet is waited for.
        lines: Begin with so many of the last lines; None for all.
        ended: Whether nothing more will come. Asked before the file is read to its end, so that no line is left out.
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
    """Open the queue, creating or upgrading its database, and close it at the end.

    Raises:
        JobStoreError: The database cannot be used.
    """
    settings = settings or Settings.load()
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        yield queue
    finally:
        queue.close()


def with_queued_arms(settings: Settings, store: Store, comparison: Comparison, *, everything: bool) -> Comparison:
    """Add the arms that wait in the queue, for somebody who reads. Without a queue the others are shown all the same.

    Args:
        settings: Where the queue is.
        store: The MLflow store.
        comparison: What MLflow has.
        everything: Whether it has the arms of all sweeps.

    Raises:
        TrackingError: The store cannot be reached.
    """
    from rankwise.tasks.sweep_lifecycle import with_queued_arms

    reason = "there is no queue yet in the database of RANKWISE_DATABASE_URL, by default in RANKWISE_HOME"
    try:
        if has_queue(settings.database_url):
            with open_queue(settings) as queue:
                return with_queued_arms(store, queue, comparison, everything=everything)
    except JobStoreError as error:
        reason = str(error)
    note(f"arms that wait are not shown: {reason}")
    return comparison


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
        print_json({"jobs": [job.to_json() for job in found]})
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
        click.echo(format_line(line))


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
            click.echo(line if as_json else format_line(line))


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
    found = [job.id for job in every_job(queue, experiment=experiment, states=states)]
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
        print_json({"jobs": [job.to_json() for job in changed]})
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


# A worker announces itself more often than this.
_SILENT_S = 120.0


@click.command()
@click.option("--experiment", help="Only jobs of this experiment.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--alive", is_flag=True, help="Print nothing; exit with 1 unless a worker of this host is at work.")
def status(experiment: str | None, as_json: bool, alive: bool) -> int:
    """Show how many jobs are in which state, the workers, what they do, and when it will be done."""
    with open_queue() as queue:
        if alive:
            return _alive(queue.workers())
        found = _status(queue, experiment)
    if as_json:
        print_json(found)
    else:
        _print(found)
    return 0


def _alive(workers: Sequence[WorkerInfo]) -> int:
    """For a container's probe."""
    here = host_name()
    mine = [worker for worker in workers if worker.host == here]
    if any(worker.silent <= _SILENT_S for worker in mine):
        return 0
    if mine:
        note(f"no worker of {here} was heard of for {_duration(min(worker.silent for worker in mine))}")
    else:
        note(f"the queue knows no worker of {here}")
    return 1


def _status(queue: JobStore, experiment: str | None) -> dict[str, Any]:
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
        "workers": [_worker(worker) for worker in queue.workers()],
        "packs": [pack.to_json() for pack in packs(jobs, attempts, time)],
        "eta_seconds": eta,
    }


def _worker(worker: WorkerInfo) -> dict[str, Any]:
    return {
        "name": worker.name,
        "host": worker.host,
        "pid": worker.pid,
        "started_at": worker.started_at,
        "silent": worker.silent,
        **worker.info,
    }


def _print(found: dict[str, Any]) -> None:
    states = Table(box=None, pad_edge=False)
    for column in ("kind", *JobState, "done in"):
        states.add_column(column, justify="left" if column == "kind" else "right")
    for kind, counts in found["jobs"].items():
        if any(counts.values()):
            states.add_row(kind, *map(str, counts.values()), _duration(found["eta_seconds"][kind]))
    if states.row_count:
        print_table(states)
    else:
        click.echo("no jobs")
    if found["held"]:
        click.echo(f"{found['held']} queued jobs are held until their rung is decided")
    for pack in found["packs"]:
        click.echo(_pack_line(pack))
    for worker in found["workers"]:
        click.echo(_worker_line(worker))
    if not found["workers"] and any(counts["queued"] for counts in found["jobs"].values()):
        note("no worker is there: start one with `rankwise worker`")


def _pack_line(pack: dict[str, Any]) -> str:
    jobs = pack["jobs"]
    parts = [f"{pack['kind']} of {pack['experiment']}: {len(jobs)} jobs ({_span(jobs)}) by {pack['worker']}"]
    parts += [pack["phase"]] if pack["phase"] else []
    parts += [f"step {pack['step']} of {pack['steps']}"] if pack["steps"] else []
    parts += [f"{pack['tokens_per_second']:.0f} tokens/s"] if pack["tokens_per_second"] else []
    parts.append(f"for {_duration(pack['seconds'])}")
    parts += [f"no progress for {_duration(pack['silent'])}"] if (pack["silent"] or 0) > _SILENT_S else []
    return ", ".join(parts)


def _span(jobs: list[int]) -> str:
    return ", ".join(map(str, jobs[:4])) + (", ..." if len(jobs) > 4 else "")


def _worker_line(worker: dict[str, Any]) -> str:
    parts = [f"worker {worker['name']}"] + [str(worker[key]) for key in ("device", "state") if worker.get(key)]
    parts += [f"silent for {_duration(worker['silent'])}"] if worker["silent"] > _SILENT_S else []
    return ", ".join(parts)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
