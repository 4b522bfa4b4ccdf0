"""`rankwise predict --submit`: the jobs of a prediction, and watching them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from rankwise.cli.output import print_json
from rankwise.cli.progress import Bars
from rankwise.inference.request import Request
from rankwise.jobs.job import Job, JobState
from rankwise.jobs.sql_store import SqlJobStore
from rankwise.settings import Settings
from rankwise.tasks.context import open_context
from rankwise.tasks.submit_prediction import Submission, submit_prediction

_LOOK_S = 1.0
_INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Jobs:
    """How a prediction is queued.

    Attributes:
        shards: Jobs that the rows are split into, at most.
        priority: The higher one is claimed first.
        watch: Whether to wait for the output.
        overwrite: Replace an output that is there.
        restart: Throw away what was begun.
    """

    shards: int
    priority: int
    watch: bool
    overwrite: bool
    restart: bool


def submit_and_watch(
    settings: Settings, bars: Bars, request: Request, source: Path, output: Path, wanted: Jobs, *, as_json: bool
) -> int:
    """Queue a prediction and say so; with `watch`, wait until its jobs have ended. Returns the exit code."""
    if request.base_model is not None and Path(request.base_model).exists():
        # A worker is started somewhere else.
        request = replace(request, base_model=str(Path(request.base_model).absolute()))
    with open_context(settings, bars) as context:
        submission = submit_prediction(
            context,
            request,
            source,
            output,
            shards=wanted.shards,
            priority=wanted.priority,
            overwrite=wanted.overwrite,
            restart=wanted.restart,
        )
        _tell(bars, submission, output)
        jobs: Sequence[Job] = submission.jobs
        if wanted.watch:
            try:
                jobs = _watch(context.queue, bars, submission)
            except KeyboardInterrupt:
                bars.warn("no longer watched; the jobs go on: rankwise jobs list --kind predict")
                return _INTERRUPTED
    if as_json:
        print_json([job.to_json() for job in jobs])
    else:
        for job in () if wanted.watch else jobs:
            click.echo(f"job {job.id}: {_what(job)}, {job.state}")
    return _end(bars, jobs[-1], output, as_json=as_json) if wanted.watch else 0


def _tell(bars: Bars, submission: Submission, output: Path) -> None:
    for asked, resolved in submission.manifest.models.items():
        if asked != resolved:
            bars.say(f"{asked} is {resolved}")
    if submission.done:
        bars.say(f"nothing to do: {output} is there, made by jobs of the queue (--overwrite makes it anew)")
        return
    count = sum(job.spec["span"] is not None for job in submission.jobs)
    waiting = sum(not job.ended for job in submission.jobs)
    bars.say(
        f"{submission.manifest.rows} rows in {count} jobs and one that puts {output.name} together, {waiting} of them "
        "to do: rankwise worker does them, rankwise status shows"
    )


def _what(job: Job) -> str:
    span = job.spec["span"]
    if span is None:
        return "puts the output together"
    shard_rows, rows = job.spec["manifest"]["shard_rows"], job.spec["manifest"]["survey"]["rows"]
    return f"rows {span[0] * shard_rows} to {min(rows, span[1] * shard_rows) - 1}"


def _watch(queue: SqlJobStore, bars: Bars, submission: Submission) -> list[Job]:
    """Wait until all jobs have ended."""
    ids = [job.id for job in submission.jobs]
    shown = 0
    with bars.task("answering", submission.manifest.rows, "rows") as advance:
        while True:
            stand = {job.id: job for job in queue.jobs(ids=ids)}
            attempts = {attempt.job_id: attempt for attempt in queue.open_attempts() if attempt.job_id in stand}
            done = sum(
                job.result["rows"] if job.result is not None else (attempts[job.id].progress or {}).get("step", 0)
                for job in stand.values()
                if job.spec["span"] is not None and (job.result is not None or job.id in attempts)
            )
            advance(max(0, done - shown))
            shown = max(shown, done)
            if all(job.ended for job in stand.values()):
                return [stand[each] for each in ids]
            time.sleep(_LOOK_S)


def _end(bars: Bars, last: Job, output: Path, *, as_json: bool) -> int:
    """Say how it went, and how the command exits."""
    if last.state is not JobState.SUCCEEDED:
        bars.fail(f"{output} was not made: {last.error or last.state}")
        return 1
    result = last.result or {}
    bars.say(f"{result['rows'] - result['failed']} of {result['rows']} rows answered")
    if result["failed"]:
        bars.say(f"{result['failed']} rows have an error in place of an answer: column error")
    if not as_json:
        click.echo(output)
    return 1 if result["failed"] else 0
