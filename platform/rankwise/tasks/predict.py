"""Predict jobs: one for each range of shards and one that assembles the output; submission and execution.

The directory `OUTPUT.parts` belongs to the jobs once they are submitted. Submitting the same prediction again finds the
same jobs and retries those that failed or were cancelled. A finished prediction is shown as a run of the MLflow
experiment `predictions`.
"""

from __future__ import annotations

import itertools
import logging
import socket
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import rankwise.flavor as flavor
from rankwise.assets.input_checks import confine
from rankwise.digests import file_digest
from rankwise.exceptions import ConfigError, JobError, TrackingError
from rankwise.experiment.hashing import digest
from rankwise.inference.file_prediction import Prediction, ShardWork, answer_shards, check_paths, plan, write_output
from rankwise.inference.predictor import Answer, Predictor
from rankwise.inference.shards import JobsStatus, Manifest, Parts, QueuedJobs, Request
from rankwise.inference.source import InputChangedError, Source
from rankwise.jobs.job import Job, JobKind, JobState, NewJob, Outcome
from rankwise.jobs.store import JobStore, every_job
from rankwise.modeling.lora.packed import delete_adapter
from rankwise.reporter import Advance, Remark
from rankwise.settings import Settings
from rankwise.tasks.context import Context
from rankwise.tasks.session import Session, StoppableReporter, token_of
from rankwise.tracking.provenance import collect
from rankwise.tracking.registry import JOB, link_inputs
from rankwise.tracking.run import Run
from rankwise.tracking.values import DatasetRecord

logger = logging.getLogger(__name__)

EXPERIMENT = "predictions"
_LAST_TRY_S = 10.0
_LONGEST = 255


@dataclass(frozen=True, kw_only=True)
class PredictWork:
    """Payload of a predict job: shards `span` as (first, last + 1), or None to assemble the output."""

    prediction: Prediction
    span: tuple[int, int] | None
    host: str

    @classmethod
    def of(cls, job: Job) -> Self:
        """Read a job's row."""
        spec = job.spec
        prediction = Prediction(
            request=Request.of(spec["request"]),
            manifest=Manifest.of(spec["manifest"]),
            source=Path(spec["input"]),
            output=Path(spec["output"]),
            whole=spec["whole"],
        )
        span = None if spec["span"] is None else (spec["span"][0], spec["span"][1])
        return cls(prediction=prediction, span=span, host=spec["host"])

    def job(self, *, priority: int, after: tuple[int, ...] = ()) -> NewJob:
        """The job as submitted to the queue."""
        prediction = self.prediction
        spec: dict[str, Any] = {
            "whole": prediction.whole,
            "span": self.span,
            "input": str(prediction.source),
            "output": str(prediction.output),
            "request": prediction.request.to_json(),
            "manifest": prediction.manifest.to_json(),
            "host": self.host,
        }
        return NewJob(
            kind=JobKind.PREDICT,
            experiment=listed_as(prediction.output),
            spec_hash=digest({"whole": prediction.whole, "span": self.span}),
            spec=spec,
            priority=priority,
            after=after,
        )


def listed_as(output: Path) -> str:
    """Experiment name under which the queue lists an output's jobs."""
    return f"predict {output.name}"[:_LONGEST]


def jobs_of_prediction(queue: JobStore, output: Path, whole: str) -> list[Job]:
    """Jobs of a prediction; the one that assembles the output is last."""
    listed = every_job(queue, kinds=[JobKind.PREDICT], experiment=listed_as(output))
    jobs = [job for job in listed if job.spec["whole"] == whole]
    return sorted(jobs, key=lambda job: (job.spec["span"] is None, job.id))


def confine_files(source: Path, output: Path, models: Iterable[str], settings: Settings) -> None:
    """Raise `ConfigError` for files outside of `RANKWISE_DATA_ROOT`; models that are absolute paths are directories."""
    directories = [Path(uri) for uri in models if uri.startswith("/")]
    for key, path in (("INPUT", source), ("OUTPUT", output), *(("--model", path) for path in directories)):
        confine(path, settings, key)


def stand_of(queue: JobStore, output: Path, whole: str) -> JobsStatus:
    """State of a prediction's jobs; a prediction without jobs counts as ended."""
    jobs = jobs_of_prediction(queue, output, whole)
    if not all(job.ended for job in jobs):
        return JobsStatus.OPEN
    return JobsStatus.DONE if jobs and jobs[-1].state is JobState.SUCCEEDED else JobsStatus.ENDED


@dataclass(frozen=True, kw_only=True)
class PredictionSubmission:
    """All jobs of a prediction, the assembling one last; `done` if they have already written the output."""

    jobs: tuple[Job, ...]
    manifest: Manifest
    done: bool = False


def submit_prediction(
    context: Context,
    request: Request,
    source: Path,
    output: Path,
    *,
    shards: int,
    priority: int = 0,
    overwrite: bool = False,
    restart: bool = False,
) -> PredictionSubmission:
    """Queue a prediction in at most `shards` jobs; continues one that a local command has begun.

    Workers must see both paths. `restart` discards what was begun and cancels its jobs.

    Raises:
        ConfigError: The request does not fit the input or the prediction in progress, the output exists, or a file is
            outside of `RANKWISE_DATA_ROOT`.
    """
    source, output = source.absolute(), output.absolute()
    check_paths(source, output)
    # Workers with the same roots would reject these files later.
    confine_files(source, output, (), context.settings)
    content = Source(source, context.settings, request.text)
    parts = Parts(output)
    with parts.locked():
        queued = parts.queued()
        if queued is not None and restart:
            _cancel(context, jobs_of_prediction(context.queue, output, queued.whole))
        restarted = restart or (queued is not None and _is_done(context, queued))
        begun = None if restarted else parts.manifest()
        if begun is None:
            # Without a manifest it is unknown what existing shards answer.
            parts.remove()
        manifest = plan(request, content, output, parts, begun, context.settings.tracking_uri, context.reporter)
        confine_files(source, output, manifest.models.values(), context.settings)
        if manifest.queued is None:
            identity, previous = _name(context, manifest, source, output)
            if previous and not overwrite and not restart and _is_there(context, output, previous[-1]):
                parts.remove()
                return PredictionSubmission(jobs=tuple(previous), manifest=manifest, done=True)
            if begun is None and output.exists() and not overwrite:
                parts.remove()
                raise ConfigError(f"{output} already exists; name another file, or replace it with --overwrite")
            # Jobs whose directory was deleted.
            _cancel(context, previous)
            manifest = replace(manifest, queued=QueuedJobs(whole=identity, spans=_spans(manifest.shards, shards)))
            # Before the jobs, so that a worker that claims one finds the manifest.
            parts.begin(manifest)
    jobs = _queue(context, request, manifest, source, output, priority)
    return PredictionSubmission(jobs=tuple(jobs), manifest=manifest)


def _cancel(context: Context, jobs: Sequence[Job]) -> None:
    context.queue.cancel([job.id for job in jobs if not job.ended])


def _name(context: Context, manifest: Manifest, source: Path, output: Path) -> tuple[str, list[Job]]:
    """A name that no prediction has yet, and the jobs of the latest identical prediction."""
    settings = {key: value for key, value in manifest.to_json().items() if key not in ("survey", "queued")}
    previous: list[Job] = []
    for number in itertools.count():
        identity = digest({**settings, "source": str(source), "output": str(output), "number": number})
        jobs = jobs_of_prediction(context.queue, output, identity)
        if not jobs:
            return identity, previous
        previous = jobs
    raise AssertionError("there is always another number")


def _is_there(context: Context, output: Path, last: Job) -> bool:
    if last.state is not JobState.SUCCEEDED or not output.exists():
        return False
    return file_digest(output, context.settings) == (last.result or {}).get("sha256")


def _is_done(context: Context, queued: QueuedJobs) -> bool:
    last = digest({"whole": queued.whole, "span": None})
    job = context.queue.find(JobKind.PREDICT, [last]).get(last)
    return job is not None and job.state is JobState.SUCCEEDED


def _spans(shards: int, jobs: int) -> tuple[tuple[int, int], ...]:
    count = min(jobs, shards)
    edges = [shards * index // count for index in range(count + 1)] if count else []
    return tuple(itertools.pairwise(edges))


def _queue(
    context: Context, request: Request, manifest: Manifest, source: Path, output: Path, priority: int
) -> Sequence[Job]:
    assert manifest.queued is not None
    whole = manifest.queued.whole
    prediction = Prediction(request=request, manifest=manifest, source=source, output=output, whole=whole)
    join = PredictWork(prediction=prediction, span=None, host=socket.gethostname())
    parts = [replace(join, span=span).job(priority=priority) for span in manifest.queued.spans]
    answering = context.queue.submit(parts, again=True)
    after = tuple(job.id for job in answering)
    return [*answering, *context.queue.submit([join.job(priority=priority, after=after)], again=True)]


def record_prediction(session: Session, job: Job, prediction: Prediction, result: dict[str, Any]) -> str | None:
    """Record a finished prediction in MLflow, in the run of an earlier attempt if there is one; returns the run ID.

    A tracking failure is only a warning, since the output exists; without any run the result is None.

    Raises:
        JobError: Another worker has taken over the job.
    """
    run: Run | None = None
    try:
        run = _open(session, job, prediction)
        manifest = prediction.manifest
        run.input(
            DatasetRecord(
                name=prediction.source.name,
                digest=manifest.request["input"],
                source=str(prediction.source),
                source_type="local",
                context="predict",
                profile={"rows": manifest.rows},
            )
        )
        run.metrics({f"predict.{key}": float(result[key]) for key in ("rows", "failed", "completion_tokens")}, 0)
        run.tags({"rankwise.output_sha256": result["sha256"]})
        run.json({**manifest.to_json(), "output": str(prediction.output)}, "prediction.json")
        store = session.context.store
        resolved = [store.registry.resolve(uri) for uri in manifest.models.values() if uri.startswith("models:")]
        run.flush()
        link_inputs(
            store.client, run.run_id, {version.model_id for version in resolved if version.model_id is not None}
        )
        run.end("FINISHED")
    except TrackingError as error:
        session.reporter.warn(f"{prediction.output} is complete, but its MLflow run is not: {error}")
        if run is None:
            return None
        # The outbox delivers the rest when the server answers; the work itself is done.
        run.end("FINISHED", f"the run lacks part of the prediction: {error}", timeout=_LAST_TRY_S)
    except BaseException:
        if run is not None:
            run.leave(timeout=0.0)
        raise
    return run.run_id


def _open(session: Session, job: Job, prediction: Prediction) -> Run:
    store, request = session.context.store, prediction.manifest.request
    if job.mlflow_run_id is not None:
        return store.resume_run(job.mlflow_run_id, system_metrics=False, attempt=job.attempts, fence=session.fence(job))
    recorded, may_write = False, session.fence(job)
    decoding = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "prompt")
    run = store.start_run(
        store.experiment(EXPERIMENT),
        prediction.output.name,
        params={
            "input": str(prediction.source),
            "input_digest": request["input"],
            "output": str(prediction.output),
            "models": ", ".join(sorted(set(prediction.manifest.models.values()))),
            **{key: request.get(key) for key in decoding},
        },
        tags={**collect().tags(), JOB: job.id},
        kind="predict",
        system_metrics=False,
        attempt=job.attempts,
        # No other worker knows the run before it is recorded.
        fence=lambda: not recorded or may_write(),
    )
    recorded = session.context.queue.set_run(token_of(job), run.run_id)
    if not recorded:
        run.end("KILLED", "another worker has taken over this prediction")
        raise JobError(f"{job.title} was taken over by another worker")
    return run


def predict_claimed(session: Session, jobs: Sequence[Job]) -> None:
    """Do the claimed jobs one after another and report how each ended.

    A stop takes effect after the current shard, which is kept. A cancelled job ends after the current batch.

    Raises:
        KeyboardInterrupt: The job was cancelled or taken over, or this process must stop; another attempt resumes it.
    """
    for job in jobs:
        work = PredictWork.of(job)
        session.phase("load")
        _check_reach(session, work)
        try:
            source = work.prediction.open(session.settings, session.reporter)
            result = (
                _join(session, job, work.prediction, source)
                if work.span is None
                else _answer(session, job, work, source)
            )
        except InputChangedError as error:
            raise ConfigError(
                f"the input {work.prediction.source} has changed since it was submitted (it was "
                f"{work.prediction.manifest.request['input']}, is {error.digest}): restore it and retry the job, or "
                "submit again with --restart"
            ) from error
        session.report(job, Outcome.SUCCEEDED, result=result)


def settle_predictions(context: Context, jobs: Collection[Job]) -> None:
    """Follow up on predict jobs that ended: delete the shards of a finished output.

    With `--fail-fast`, cancel the remaining jobs of a failed prediction.
    """
    for job in jobs:
        if job.kind is not JobKind.PREDICT:
            continue
        work = PredictWork.of(job)
        prediction, parts = work.prediction, work.prediction.parts
        if job.state is JobState.SUCCEEDED and work.span is None and parts.own:
            # The lock's holder is preparing a prediction into the same output and removes finished shards itself.
            with suppress(ConfigError), parts.locked():
                if parts.own:
                    parts.remove()
                    parts.sweep()
        if job.state is JobState.FAILED and prediction.request.fail_fast:
            assert prediction.whole is not None
            others = jobs_of_prediction(context.queue, prediction.output, prediction.whole)
            context.queue.cancel([other.id for other in others if not other.ended])


def _check_reach(session: Session, work: PredictWork) -> None:
    """Raise `JobError` for paths that do not exist here: another worker may see them."""
    source, output, parts = work.prediction.source, work.prediction.output, work.prediction.parts
    confine_files(source, output, work.prediction.manifest.models.values(), session.settings)
    here = socket.gethostname()
    shared = f"submitted on {work.host}, claimed on {here}: every worker must see INPUT and OUTPUT under these paths"
    if not source.exists():
        raise JobError(f"the input {source} does not exist on this machine ({shared})")
    if not parts.own:
        raise JobError(
            f"{parts.directory} does not exist here, or belongs to another prediction ({shared}); if it was removed, "
            "submit again with --restart"
        )


def _answer(session: Session, job: Job, work: PredictWork, source: Source) -> dict[str, Any]:
    assert work.span is not None
    prediction, parts = work.prediction, work.prediction.parts
    part = prediction.shard_work(range(*work.span))
    first = prediction.manifest.span(part.shards.start).start
    logger.info("rows %d to %d, %d of them already answered", first, first + part.rows - 1, part.reused)
    tokens, seconds = 0, 0.0
    if part.pending:
        with ExitStack() as stack:
            predictor = _load(session, prediction, stack)
            session.phase("answer")
            advance = stack.enter_context(session.reporter.task("answering", part.rows - part.reused, "rows"))
            watched = _ShardProgress(session, token_of(job), advance, part)

            def keep(shard: int, answers: list[Answer]) -> None:
                _check_still_own(session, job, parts)
                parts.write(shard, answers)
                watched.keep(answers)
                if session.stop.is_set() and shard != part.pending[-1]:
                    raise KeyboardInterrupt

            try:
                tokens, seconds = answer_shards(prediction, part, source, predictor, keep, watched)
            except JobError as error:
                if prediction.request.fail_fast:
                    raise ConfigError(f"--fail-fast: {error}") from error
                raise
    return {"rows": part.rows, "reused": part.reused, "completion_tokens": tokens, "seconds": seconds}


def _check_still_own(session: Session, job: Job, parts: Parts) -> None:
    """Check before each write that neither the job nor its output directory was taken over."""
    if not session.may_publish(job):
        raise KeyboardInterrupt
    if not parts.own:
        # Who submits with --restart cancels the job first; this worker may not have been told yet.
        if session.context.queue.get(job.id).cancel_requested:
            raise KeyboardInterrupt
        raise ConfigError(
            f"{parts.directory} was removed, or taken by another prediction, while this job was running; "
            "submit again with --restart if you still need the output"
        )


def _load(session: Session, prediction: Prediction, stack: ExitStack) -> Predictor:
    uris = list(dict.fromkeys(prediction.manifest.models.values()))
    with session.reporter.task(f"loading {len(uris)} adapters and their base", None, "adapters"):
        loaded = flavor.load_models(
            uris,
            base_model=prediction.request.base_model,
            allow_base_mismatch=prediction.request.allow_base_mismatch,
            attn_implementation=prediction.request.attn_implementation,
            settings=session.settings,
            find=session.bases.recorded,
            tracking_uri=session.settings.tracking_uri,
        )
    for name in {adapter.adapter_name for adapter in loaded}:
        stack.callback(delete_adapter, loaded[0].base.model, name)
    return stack.enter_context(Predictor(dict(zip(uris, loaded, strict=True))))


class _ShardProgress(StoppableReporter):
    """Reports rows of a job; a stop does not interrupt a shard."""

    stops = False

    def __init__(self, session: Session, token: str, advance: Advance, part: ShardWork) -> None:
        super().__init__(session, [token])
        self._advance = advance
        self._rows, self._done, self._kept = part.rows, part.reused, len(part.shards) - len(part.pending)
        self._tokens_made = 0
        self._began = time.perf_counter()
        self._report_progress(0)

    def shown(self, description: str, total: int | None, unit: str) -> AbstractContextManager[tuple[Advance, Remark]]:
        """One bar for all shards of the job."""
        return nullcontext((self._advance, lambda text: None))

    def moved(self, description: str, done: int, total: int | None) -> None:
        """Report rows of the current shard."""
        self._report_progress(done)

    def _report_progress(self, more: int) -> None:
        """Report the rows answered so far; `more` of them are not saved yet."""
        values: dict[str, Any] = {
            "phase": "answer",
            "step": self._done + more,
            "steps": self._rows,
            "checkpoint": self._kept,
        }
        if self._tokens_made:
            values["tokens_per_second"] = self._tokens_made / (time.perf_counter() - self._began)
        for token in self._tokens:
            self._session.progress(token, values, always=not more)

    def keep(self, answers: Sequence[Answer]) -> None:
        """Count a shard that is on disk."""
        self._done += len(answers)
        self._kept += 1
        self._tokens_made += sum(answer.completion_tokens or 0 for answer in answers)
        self._report_progress(0)


def _join(session: Session, job: Job, prediction: Prediction, source: Source) -> dict[str, Any]:
    session.phase("upload")
    parts, manifest = prediction.parts, prediction.manifest
    missing = prediction.shard_work(range(manifest.shards)).pending
    if missing:
        raise ConfigError(
            f"{parts.directory} lacks {len(missing)} of {manifest.shards} shards (the first is {missing[0]}), although "
            "all jobs that answer them succeeded: files were removed; submit again with --restart"
        )
    _check_still_own(session, job, parts)
    failed = write_output(prediction, source)
    session.reporter.done(f"{prediction.output}: {manifest.rows - failed} of {manifest.rows} rows answered")
    result = {
        "output": str(prediction.output),
        "rows": manifest.rows,
        "failed": failed,
        "completion_tokens": sum(answer.completion_tokens or 0 for answer in parts.answers(manifest)),
        "models": dict(manifest.models),
        "sha256": file_digest(prediction.output, session.settings),
    }
    return {**result, "run_id": record_prediction(session, job, prediction, result)}
