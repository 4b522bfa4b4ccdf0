"""`rankwise predict`: a table of rows in, a table of answers out; with `--submit`, by jobs of the queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import click

from rankwise.cli.jobs import open_queue
from rankwise.cli.output import note, print_json
from rankwise.jobs.job import Job, JobState
from rankwise.settings import Settings

if TYPE_CHECKING:
    from rankwise.cli.output import Bars
    from rankwise.inference.shards import JobsStatus, QueuedJobs, Request
    from rankwise.jobs.store import JobStore
    from rankwise.tasks.predict import PredictionSubmission


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="URI",
    help="models:/NAME@ALIAS, models:/NAME/VERSION or a directory; repeatable. The first answers rows that name none.",
)
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEMPLATE", help="A template over columns, such as 'carat {carat}, cut {cut}'.")
@click.option("--model-column", default="model", show_default=True, help="The column in which a row names its model.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="The longest answer, in tokens."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 draws from all tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Draws from the fewest tokens that have this probability together.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="A text that ends an answer; repeatable.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; row i draws from (seed, i).")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows decoded together.")
@click.option("--shard-rows", type=click.IntRange(min=1), default=256, show_default=True, help="Rows between savings.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first row that cannot be answered.")
@click.option("--overwrite", is_flag=True, help="Replace an OUTPUT that is there.")
@click.option("--restart", is_flag=True, help="Throw away what an interrupted run has done.")
@click.option("--base-model", metavar="SOURCE", help="Where the base is, if not where it was recorded.")
@click.option(
    "--allow-base-mismatch", is_flag=True, help="Run over another base all the same; a warning says what differs."
)
@click.option("--device", help="cpu, cuda, cuda:1; the first GPU, else the CPU, by default.")
@click.option("--submit", is_flag=True, help="Let workers do it: jobs of the queue, in place of this process.")
@click.option(
    "--shards", type=click.IntRange(min=1), help="With --submit: jobs that the rows are split into. Default: one."
)
@click.option("--priority", type=int, help="With --submit: jobs of a higher one are claimed first. Default: 0.")
@click.option("--watch", is_flag=True, help="With --submit: wait until the output is there.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def predict(
    source: Path,
    output: Path,
    submit: bool,
    shards: int | None,
    priority: int | None,
    watch: bool,
    overwrite: bool,
    restart: bool,
    as_json: bool,
    **asked: Any,
) -> int:
    """Answer the rows of INPUT with registered adapters, into OUTPUT (.jsonl, .csv or .parquet, both).

    A row has a column `prompt` (a text) or `messages` (a chat), or the columns of --prompt; it may name its model. All
    adapters lie over one base in memory, and rows of different adapters share a batch. A row that cannot be answered
    gets an `error`, and the command exits with 1 in the end. Aliases are resolved once. An interrupted command goes on
    where it was when it is given again.

    With --submit the rows are answered by workers (`rankwise worker`), which must see INPUT and OUTPUT under the same
    paths; the output is the same file. Given again, the command finds its jobs, and tries failed ones again.
    """
    if not submit and (shards is not None or priority is not None or watch):
        raise click.UsageError("--shards, --priority and --watch go with --submit")
    if submit and asked["device"] is not None:
        raise click.UsageError("--device does not go with --submit: each worker has its own device")
    from rich.console import Console

    from rankwise.cli.output import Bars

    settings = Settings.load()
    with Bars(Console(stderr=True, highlight=False)) as bars:
        # Late: torch and MLflow take seconds to import.
        from rankwise.inference.file_prediction import predict_file
        from rankwise.inference.shards import Request
        from rankwise.modeling.decoding.generation import Decoding
        from rankwise.tasks.predict import stand_of
        from rankwise.tracking.connection import connect

        decoding = Decoding(**{each.name: asked.pop(each.name) for each in fields(Decoding)})
        request = Request(decoding=decoding, **asked)
        where: _Where = {"source": source, "output": output, "overwrite": overwrite, "restart": restart}
        if submit:
            return _submit(settings, bars, request, shards or 1, priority or 0, watch=watch, as_json=as_json, **where)
        connect(settings)

        def jobs_status(queued: QueuedJobs) -> JobsStatus:
            with open_queue(settings) as queue:
                return stand_of(queue, output, queued.whole)

        summary = predict_file(
            request,
            settings=settings,
            tracking_uri=settings.tracking_uri,
            jobs_status=jobs_status,
            progress=bars,
            **where,
        )
    for name, resolved in summary.models.items():
        if name != resolved:
            note(f"{name} was {resolved}")
    speed = f", {summary.completion_tokens / summary.seconds:,.0f} tokens a second" if summary.completion_tokens else ""
    reused = f" ({summary.reused} of them by an earlier run)" if summary.reused else ""
    code = _ended(note, summary.rows, summary.failed, f"{reused}{speed}")
    if as_json:
        print_json(summary.to_json())
    else:
        click.echo(output)
    return code


def _ended(say: Callable[[str], None], rows: int, failed: int, more: str = "") -> int:
    """Say how many rows were answered. Returns the exit code."""
    say(f"{rows - failed} of {rows} rows answered{more}")
    if failed:
        say(f"{failed} rows have an error in place of an answer: column error")
    return 1 if failed else 0


_LOOK_S = 1.0
_INTERRUPTED = 130


class _Where(TypedDict):
    """The files of a prediction, and what to do with what is there."""

    source: Path
    output: Path
    overwrite: bool
    restart: bool


def _submit(
    settings: Settings,
    bars: Bars,
    request: Request,
    shards: int,
    priority: int,
    *,
    watch: bool,
    as_json: bool,
    **where: Unpack[_Where],
) -> int:
    """Queue a prediction and say so; with `watch`, wait until its jobs have ended. Returns the exit code."""
    if request.base_model is not None and Path(request.base_model).exists():
        # A worker is started somewhere else.
        request = replace(request, base_model=str(Path(request.base_model).absolute()))
    from rankwise.tasks.context import open_context
    from rankwise.tasks.predict import submit_prediction

    output = where["output"]
    with open_context(settings, bars) as context:
        submission = submit_prediction(context, request, shards=shards, priority=priority, **where)
        _tell(bars, submission, output)
        jobs: Sequence[Job] = submission.jobs
        if watch:
            try:
                jobs = _watch(context.queue, bars, submission)
            except KeyboardInterrupt:
                bars.warn("no longer watched; the jobs go on: rankwise jobs list --kind predict")
                return _INTERRUPTED
    if as_json:
        print_json({"jobs": [job.to_json() for job in jobs]})
    else:
        for job in () if watch else jobs:
            click.echo(f"job {job.id}: {_what(job)}, {job.state}")
    return _end(bars, jobs[-1], output, as_json=as_json) if watch else 0


def _tell(bars: Bars, submission: PredictionSubmission, output: Path) -> None:
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


def _watch(queue: JobStore, bars: Bars, submission: PredictionSubmission) -> list[Job]:
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
    code = _ended(bars.say, result["rows"], result["failed"])
    if not as_json:
        click.echo(output)
    return code
