"""`rankwise predict`: answer the rows of a table, in this process or with `--submit` by jobs of the queue."""

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
    help="models:/NAME@ALIAS, models:/NAME/VERSION or a directory; repeatable. The first is the default for rows.",
)
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--prompt", metavar="TEMPLATE", help="Template over columns, such as 'carat {carat}, cut {cut}'.")
@click.option("--delimiter", metavar="CHARACTER", help="What separates cells. Default: a comma, in .tsv a tab.")
@click.option("--encoding", metavar="NAME", help="Encoding of a text input, such as cp1252. Default: utf-8.")
@click.option("--model-column", default="model", show_default=True, help="Column with the model of a row.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=64, show_default=True, help="Maximum length of an answer."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 samples from all tokens.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the smallest set of tokens with this total probability.",
)
@click.option("--stop", multiple=True, metavar="TEXT", help="Text that ends an answer; repeatable.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of sampling; row i draws from (seed, i).")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows decoded together.")
@click.option("--shard-rows", type=click.IntRange(min=1), default=256, show_default=True, help="Rows saved together.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first row that cannot be answered.")
@click.option("--overwrite", is_flag=True, help="Replace an existing OUTPUT.")
@click.option("--restart", is_flag=True, help="Discard the work of an interrupted run.")
@click.option("--base-model", metavar="SOURCE", help="Location of the base. Default: the recorded one.")
@click.option(
    "--allow-base-mismatch", is_flag=True, help="Allow another base than in training; a warning shows the differences."
)
@click.option("--device", help="cpu, cuda, cuda:1. Default: the first GPU, or the CPU.")
@click.option(
    "--attn-implementation",
    type=click.Choice(["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]),
    help="Attention implementation. Default: what training used, if it runs on this device.",
)
@click.option("--submit", is_flag=True, help="Queue jobs for workers instead of answering here.")
@click.option("--shards", type=click.IntRange(min=1), help="With --submit: number of jobs. Default: 1.")
@click.option("--priority", type=int, help="With --submit: higher priorities are claimed first. Default: 0.")
@click.option("--watch", is_flag=True, help="With --submit: wait for the output.")
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
    **options: Any,
) -> int:
    """Answer the rows of INPUT with registered adapters, and write OUTPUT (.jsonl, .csv or .parquet).

    INPUT is a file of any type that training reads: .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet or .arrow.

    A row has a column `prompt` (text) or `messages` (chat), or the columns of --prompt; it may name its model. All
    adapters share one base in memory, and rows of different adapters share batches. A row that cannot be answered gets
    an `error`, and the command exits with 1. Aliases are resolved once. Repeat an interrupted command to resume it.

    With --submit, workers (`rankwise worker`) answer the rows; they must see INPUT and OUTPUT under the same paths. The
    output is identical. Repeat the command to see its jobs and retry failed ones.
    """
    if not submit and (shards is not None or priority is not None or watch):
        raise click.UsageError("--shards, --priority and --watch need --submit")
    if submit and options["device"] is not None:
        raise click.UsageError("--device cannot be used with --submit: each worker has its own device")
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

        decoding = Decoding(**{entry.name: options.pop(entry.name) for entry in fields(Decoding)})
        request = Request(decoding=decoding, **options)
        files: _PredictionFiles = {"source": source, "output": output, "overwrite": overwrite, "restart": restart}
        if submit:
            return _submit(settings, bars, request, shards or 1, priority or 0, watch=watch, as_json=as_json, **files)
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
            **files,
        )
    for name, resolved in summary.models.items():
        if name != resolved:
            note(f"{name} resolved to {resolved}")
    speed = f", {summary.completion_tokens / summary.seconds:,.0f} tokens/s" if summary.completion_tokens else ""
    reused = f" ({summary.reused} of them in an earlier run)" if summary.reused else ""
    code = _report_counts(note, summary.rows, summary.failed, f"{reused}{speed}")
    if as_json:
        print_json(summary.to_json())
    else:
        click.echo(output)
    return code


def _report_counts(say: Callable[[str], None], rows: int, failed: int, more: str = "") -> int:
    """Report how many rows were answered; returns the exit code."""
    say(f"{rows - failed} of {rows} rows answered{more}")
    if failed:
        say(f"{failed} rows failed: see column error")
    return 1 if failed else 0


_LOOK_S = 1.0
_INTERRUPTED = 130


class _PredictionFiles(TypedDict):
    """The files of a prediction, and how to treat existing ones."""

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
    **files: Unpack[_PredictionFiles],
) -> int:
    """Queue a prediction; with `watch`, wait until its jobs have ended. Returns the exit code."""
    if request.base_model is not None and Path(request.base_model).exists():
        # Workers have other working directories.
        request = replace(request, base_model=str(Path(request.base_model).absolute()))
    from rankwise.tasks.context import open_context
    from rankwise.tasks.predict import submit_prediction

    output = files["output"]
    with open_context(settings, bars) as context:
        submission = submit_prediction(context, request, shards=shards, priority=priority, **files)
        _report_submission(bars, submission, output)
        jobs: Sequence[Job] = submission.jobs
        if watch:
            try:
                jobs = _watch(context.queue, bars, submission)
            except KeyboardInterrupt:
                bars.warn("stopped watching; the jobs continue: rankwise jobs list --kind predict")
                return _INTERRUPTED
    if as_json:
        print_json({"jobs": [job.to_json() for job in jobs]})
    else:
        for job in () if watch else jobs:
            click.echo(f"job {job.id}: {_describe_work(job)}, {job.state}")
    return _report_end(bars, jobs[-1], output, as_json=as_json) if watch else 0


def _report_submission(bars: Bars, submission: PredictionSubmission, output: Path) -> None:
    for uri, resolved in submission.manifest.models.items():
        if uri != resolved:
            bars.say(f"{uri} is {resolved}")
    if submission.done:
        bars.say(f"nothing to do: queued jobs have already made {output} (--overwrite makes it again)")
        return
    count = sum(job.spec["span"] is not None for job in submission.jobs)
    pending = sum(not job.ended for job in submission.jobs)
    bars.say(
        f"{submission.manifest.rows} rows in {count} jobs and one that writes {output.name}, {pending} pending: "
        "rankwise worker does them, rankwise status shows progress"
    )


def _describe_work(job: Job) -> str:
    span = job.spec["span"]
    if span is None:
        return "writes the output"
    shard_rows, rows = job.spec["manifest"]["shard_rows"], job.spec["manifest"]["survey"]["rows"]
    return f"rows {span[0] * shard_rows} to {min(rows, span[1] * shard_rows) - 1}"


def _watch(queue: JobStore, bars: Bars, submission: PredictionSubmission) -> list[Job]:
    """Wait until all jobs have ended."""
    ids = [job.id for job in submission.jobs]
    shown = 0
    with bars.task("answering", submission.manifest.rows, "rows") as advance:
        while True:
            current = {job.id: job for job in queue.jobs(ids=ids)}
            attempts = {attempt.job_id: attempt for attempt in queue.open_attempts() if attempt.job_id in current}
            done = sum(
                job.result["rows"] if job.result is not None else (attempts[job.id].progress or {}).get("step", 0)
                for job in current.values()
                if job.spec["span"] is not None and (job.result is not None or job.id in attempts)
            )
            advance(max(0, done - shown))
            shown = max(shown, done)
            if all(job.ended for job in current.values()):
                return [current[job_id] for job_id in ids]
            time.sleep(_LOOK_S)


def _report_end(bars: Bars, last: Job, output: Path, *, as_json: bool) -> int:
    """Report the result; returns the exit code."""
    if last.state is not JobState.SUCCEEDED:
        bars.fail(f"{output} was not written: {last.error or last.state}")
        return 1
    result = last.result or {}
    code = _report_counts(bars.say, result["rows"], result["failed"])
    if not as_json:
        click.echo(output)
    return code
