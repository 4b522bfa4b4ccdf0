"""`rankwise status`: the queue at one look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from rich.table import Table

from rankwise.cli.output import note, print_json, print_table
from rankwise.cli.queue import open_queue
from rankwise.jobs.job import JobKind, JobState, WorkerInfo
from rankwise.jobs.outlook import packs, remaining_seconds
from rankwise.jobs.sql_store import SqlJobStore
from rankwise.worker.host import host

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
    here = host()
    mine = [worker for worker in workers if worker.host == here]
    if any(worker.silent <= _SILENT_S for worker in mine):
        return 0
    if mine:
        note(f"no worker of {here} was heard of for {_duration(min(worker.silent for worker in mine))}")
    else:
        note(f"the queue knows no worker of {here}")
    return 1


def _status(queue: SqlJobStore, experiment: str | None) -> dict[str, Any]:
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
