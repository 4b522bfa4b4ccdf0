"""Predict jobs: answer some shards of an input, or put the output together once all of them are there.

- A prediction in MLflow: what was answered by which versions, as a run of the experiment `predictions`.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any

import rankwise.flavor as flavor
from rankwise.digests import file_digest
from rankwise.exceptions import ConfigError, JobError, TrackingError
from rankwise.inference.predict import answer_shards, check_adapters, write_output
from rankwise.inference.predictor import Predictor
from rankwise.jobs.job import Job, JobKind, JobState, Outcome
from rankwise.modeling.lora.packed import delete_adapter
from rankwise.reporter import Advance, Remark
from rankwise.tasks.context import Context
from rankwise.tasks.session import Session, Stoppable, token_of
from rankwise.tasks.submit_prediction import Prediction, confine_files, jobs_of_prediction
from rankwise.tracking.provenance import collect
from rankwise.tracking.registry import JOB, link_inputs
from rankwise.tracking.run import Run
from rankwise.tracking.values import DatasetRecord

EXPERIMENT = "predictions"
_LAST_TRY_S = 10.0


def record_prediction(session: Session, job: Job, work: Prediction, result: dict[str, Any]) -> str | None:
    """Show a prediction whose output is there. The output is what counts: without a server it is not shown.

    Args:
        session: The child.
        job: The job that put the output together; another attempt writes to the same run.
        work: What it says.
        result: What its row is to keep.

    Returns:
        The run; None where the tracking server does not answer.

    Raises:
        JobError: Another worker has taken over the job.
    """
    run: Run | None = None
    try:
        run = _open(session, job, work)
        manifest = work.manifest
        run.input(
            DatasetRecord(
                name=work.source.name,
                digest=manifest.request["input"],
                source=str(work.source),
                source_type="local",
                context="predict",
                profile={"rows": manifest.rows},
            )
        )
        run.metrics({f"predict.{key}": float(result[key]) for key in ("rows", "failed", "completion_tokens")}, 0)
        run.tags({"rankwise.output_sha256": result["sha256"]})
        run.json({**manifest.to_json(), "output": str(work.output)}, "prediction.json")
        store = session.context.store
        resolved = [store.registry.resolve(uri) for uri in manifest.models.values() if uri.startswith("models:")]
        run.flush()
        link_inputs(store.client, run.run_id, {each.model_id for each in resolved if each.model_id is not None})
        run.end("FINISHED")
    except TrackingError as error:
        session.voice.warn(f"{work.output} is there, and MLflow does not show all of it: {error}")
        if run is None:
            return None
        # What it lacks is delivered when the server answers; the work has ended all the same.
        run.end("FINISHED", f"not all of the prediction is shown: {error}", timeout=_LAST_TRY_S)
    except BaseException:
        if run is not None:
            run.leave(timeout=0.0)
        raise
    return run.run_id


def _open(session: Session, job: Job, work: Prediction) -> Run:
    """The job's run: a new one, or that of an earlier attempt."""
    store, request = session.context.store, work.manifest.request
    if job.mlflow_run_id is not None:
        return store.resume_run(job.mlflow_run_id, system_metrics=False, attempt=job.attempts, fence=session.fence(job))
    noted, may_speak = False, session.fence(job)
    decoding = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "prompt")
    run = store.start_run(
        store.experiment(EXPERIMENT),
        work.output.name,
        params={
            "input": str(work.source),
            "input_digest": request["input"],
            "output": str(work.output),
            "models": ", ".join(sorted(set(work.manifest.models.values()))),
            **{key: request.get(key) for key in decoding},
        },
        tags={**collect().tags(), JOB: job.id},
        kind="predict",
        system_metrics=False,
        attempt=job.attempts,
        # Nobody else knows of it before it is noted.
        fence=lambda: not noted or may_speak(),
    )
    noted = session.context.queue.set_run(token_of(job), run.run_id)
    if not noted:
        run.end("KILLED", "another worker has taken over this prediction")
        raise JobError(f"{job.title} was taken over by another worker")
    return run


logger = logging.getLogger(__name__)


def predict_claimed(session: Session, jobs: Sequence[Job]) -> None:
    """Do the claimed jobs, one after another, and report the end of each.

    A wish to stop is heard between two shards, which are kept; a cancelled job ends after the batch under way.

    Raises:
        RankwiseError: What a person has to mend.
        KeyboardInterrupt: Nobody wants it any more, or this process is to stop; another attempt goes on.
    """
    for job in jobs:
        work = Prediction.of(job)
        session.phase("load")
        _check_reach(session, work)
        result = _join(session, job, work) if work.span is None else _answer(session, job, work)
        session.report(job, Outcome.SUCCEEDED, result=result)


def settle_predictions(context: Context, jobs: Collection[Job]) -> None:
    """What follows from predict jobs, now that the queue knows how they ended.

    The shards of an output that is there are removed. With `--fail-fast`, what is left of a failed prediction is
    cancelled.
    """
    for job in jobs:
        if job.kind is not JobKind.PREDICT:
            continue
        work = Prediction.of(job)
        if job.state is JobState.SUCCEEDED and work.span is None and work.parts.own:
            # Whoever holds it is at a prediction into the same output, and removes what has ended well.
            with suppress(ConfigError), work.parts.held():
                if work.parts.own:
                    work.parts.remove()
                    work.parts.sweep()
        if job.state is JobState.FAILED and work.request.fail_fast:
            others = jobs_of_prediction(context.queue, work.output, work.whole)
            context.queue.cancel([other.id for other in others if not other.ended])


def _check_reach(session: Session, work: Prediction) -> None:
    """Refuse what this worker cannot see, or what has changed since the submission.

    Raises:
        JobError: A path is not there; another worker may see it.
        ConfigError: The input is another one, or this machine does not touch such files.
    """
    confine_files(work.source, work.output, work.manifest.models.values(), session.settings)
    here = socket.gethostname()
    shared = f"submitted on {work.host}, claimed on {here}: INPUT and OUTPUT must lie where every worker sees them"
    if not work.source.exists():
        raise JobError(f"there is no input {work.source} on this machine ({shared})")
    if not work.parts.own:
        raise JobError(
            f"{work.parts.directory} is not there, or belongs to another prediction ({shared}); if somebody has "
            "removed it, submit again with --restart"
        )
    found, recorded = file_digest(work.source, session.settings), work.manifest.request["input"]
    if found != recorded:
        raise ConfigError(
            f"the input {work.source} has changed since it was submitted (it was {recorded}, is {found}): put it back "
            "and retry the job, or submit again with --restart"
        )


def _answer(session: Session, job: Job, work: Prediction) -> dict[str, Any]:
    """Answer the shards of a job that no earlier attempt has; what the job's row is to keep."""
    assert work.span is not None
    parts, token, span = work.parts, token_of(job), range(*work.span)
    left = [shard for shard in span if not parts.has(shard)]
    done = work.rows - sum(len(work.manifest.span(shard)) for shard in left)
    tokens, seconds = 0, 0.0
    first = work.manifest.span(span.start).start
    logger.info("rows %d to %d, %d of them answered already", first, first + work.rows - 1, done)
    if left:
        with ExitStack() as stack:
            predictor = _load(session, work, stack)
            check_adapters(work.manifest, predictor.adapters)
            session.phase("answer")
            advance = stack.enter_context(session.voice.task("answering", work.rows - done, "rows"))
            watched = _Watched(session, token, advance, rows=work.rows, done=done, kept=len(span) - len(left))
            began = time.perf_counter()
            try:
                for shard, answers in answer_shards(
                    work.request, work.manifest, work.source, set(left), predictor, watched
                ):
                    _check_still_own(session, job, work)
                    parts.write(shard, answers)
                    tokens += sum(answer.completion_tokens or 0 for answer in answers)
                    watched.keep(len(answers), tokens)
                    if session.stop.is_set() and shard != left[-1]:
                        raise KeyboardInterrupt
            except JobError as error:
                if work.request.fail_fast:
                    raise ConfigError(f"--fail-fast: {error}") from error
                raise
            seconds = time.perf_counter() - began
    return {"rows": work.rows, "reused": done, "completion_tokens": tokens, "seconds": seconds}


def _check_still_own(session: Session, job: Job, work: Prediction) -> None:
    """Before each write: the job may have been taken over, and its output given to another prediction meanwhile.

    Raises:
        KeyboardInterrupt: Another attempt has the job, or nobody wants it any more.
        ConfigError: The directory belongs to another prediction, or is gone.
    """
    if not session.may_publish(job):
        raise KeyboardInterrupt
    if not work.parts.own:
        raise ConfigError(
            f"{work.parts.directory} was removed, or given to another prediction, while this job answered its rows: "
            "nothing more is written there; submit again with --restart if it is still wanted"
        )


def _load(session: Session, work: Prediction, stack: ExitStack) -> Predictor:
    """The models of a prediction over the base in memory, where it is the one they ask for; taken off at the end."""
    uris = list(dict.fromkeys(work.manifest.models.values()))
    with session.voice.task(f"loading {len(uris)} adapters and their base", None, "adapters"):
        loaded = flavor.load_models(
            uris,
            base_model=work.request.base_model,
            allow_base_mismatch=work.request.allow_base_mismatch,
            settings=session.settings,
            find=session.bases.recorded,
            tracking_uri=session.settings.tracking_uri,
        )
    for name in {adapter.adapter_name for adapter in loaded}:
        stack.callback(delete_adapter, loaded[0].base.model, name)
    return stack.enter_context(Predictor(dict(zip(uris, loaded, strict=True))))


class _Watched(Stoppable):
    """Progress within a job: rows that are kept and rows of the shard under way. A shard is not cut off by a stop."""

    stops = False

    def __init__(self, session: Session, token: str, advance: Advance, *, rows: int, done: int, kept: int) -> None:
        super().__init__(session, [token])
        self._advance = advance
        self._rows, self._done, self._kept, self._tokens_made = rows, done, kept, 0
        self._began = time.perf_counter()
        self._tell(0)

    def shown(self, description: str, total: int | None, unit: str) -> AbstractContextManager[tuple[Advance, Remark]]:
        """One bar for all shards of the job."""
        return nullcontext((self._advance, lambda text: None))

    def moved(self, description: str, done: int, total: int | None) -> None:
        """Rows of the shard under way."""
        self._tell(done)

    def _tell(self, more: int) -> None:
        """Say how many rows are answered, `more` of them not kept yet."""
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

    def keep(self, rows: int, tokens: int) -> None:
        """A shard is on disk."""
        self._done += rows
        self._kept += 1
        self._tokens_made = tokens
        self._tell(0)


def _join(session: Session, job: Job, work: Prediction) -> dict[str, Any]:
    """Put the output together; what the job's row is to keep."""
    session.phase("upload")
    parts, manifest = work.parts, work.manifest
    missing = [shard for shard in range(manifest.shards) if not parts.has(shard)]
    if missing:
        raise ConfigError(
            f"{parts.directory} lacks {len(missing)} of {manifest.shards} shards, the first is {missing[0]}, although "
            "all jobs that answer them have succeeded: somebody has removed files; submit again with --restart"
        )
    _check_still_own(session, job, work)
    failed = write_output(work.source, work.output, parts.answers(manifest), manifest.survey)
    session.voice.done(f"{work.output}: {manifest.rows - failed} of {manifest.rows} rows answered")
    result = {
        "output": str(work.output),
        "rows": manifest.rows,
        "failed": failed,
        "completion_tokens": sum(answer.completion_tokens or 0 for answer in parts.answers(manifest)),
        "models": dict(manifest.models),
        "sha256": file_digest(work.output, session.settings),
    }
    return {**result, "run_id": record_prediction(session, job, work, result)}
