"""Evaluate a claimed pack: adapters out of the registry, and the bare base, on the same rows in mixed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import rankwise.flavor as flavor
from rankwise.assets.progress import Advance
from rankwise.evaluation.evaluator import MAX_ROWS, Evaluation, evaluate
from rankwise.evaluation.predictions import prediction_rows
from rankwise.evaluation.summary import to_tracking
from rankwise.exceptions import JobError, RankwiseError
from rankwise.inference.generate import greedy
from rankwise.jobs.job import Job, JobKind, Outcome
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.dequantized import keep_dequantized
from rankwise.modeling.packed_lora import delete_adapter
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.context import Context
from rankwise.tasks.heartbeat import Heartbeat
from rankwise.tasks.link import EVAL_HASH, run_of_arm
from rankwise.tasks.outcomes import outcome_of
from rankwise.tasks.payload import Work
from rankwise.tasks.prepare import find_sources
from rankwise.tasks.rows import Rows, RowsCache
from rankwise.tracking.descriptions import base_note
from rankwise.tracking.linking import link_metrics
from rankwise.tracking.provenance import collect


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What one job evaluates: the adapter of a trained arm, or the bare base."""

    job: Job
    token: str
    work: Work
    trained: dict[str, Any] | None


def evaluate_claimed(context: Context, jobs: Sequence[Job], bases: BaseHolder, rows: RowsCache) -> None:
    """Evaluate the jobs of one claim over one base and finish each of them.

    Adapters are loaded by their registered URI, with all checks of the flavor, as any user would.

    Raises:
        RankwiseError: What a person has to mend; the jobs are noted as failed first.
        Exception: A bug; likewise.
    """
    tokens = {job.id: job.token for job in jobs if job.token is not None}
    with Heartbeat(context.queue, list(tokens.values())) as heart:
        try:
            subjects = [_subject(context, job, tokens[job.id]) for job in jobs]
            arm = subjects[0].work.arm
            sources = find_sources(arm, context.settings, context.voice)
            base = bases.get(sources.base, arm.quantization)
            table = rows.get(arm, sources, base.tokenizer)
            names = _attach(context, base, subjects)
            try:
                adapters = [names[subject.job.id] for subject in subjects]
                results = _evaluate(context, base, table, adapters, arm.evaluation)
            finally:
                for name in filter(None, names.values()):
                    delete_adapter(base.model, name)
            for subject in subjects:
                if heart.holds(subject.token) and context.queue.holds(subject.token):
                    _publish(context, subject, table, results[names[subject.job.id]])
                heart.release(subject.token)
        except BaseException as error:
            text = str(error) if isinstance(error, RankwiseError) else f"{type(error).__name__}: {error}"
            for token in tokens.values():
                if heart.holds(token):
                    context.queue.finish(token, outcome_of(error), error=text)
            raise


def _subject(context: Context, job: Job, token: str) -> _Subject:
    work = Work.of(job)
    if work.bare:
        return _Subject(job=job, token=token, work=work, trained=None)
    trained = context.queue.find(JobKind.TRAIN, [work.arm.spec_hash]).get(work.arm.spec_hash)
    if trained is None or trained.result is None:
        raise JobError(f"job {job.id} evaluates arm {work.arm.short}, which has not been trained")
    return _Subject(job=job, token=token, work=work, trained=trained.result)


def _attach(context: Context, base: LoadedBase, subjects: Sequence[_Subject]) -> dict[int, str | None]:
    """Load the adapters onto the base; their names by job, None for the bare base."""
    trained = [subject for subject in subjects if subject.trained is not None]
    uris = [subject.trained["model_uri"] for subject in trained if subject.trained is not None]
    names: dict[int, str | None] = {subject.job.id: None for subject in subjects}
    if uris:
        with context.voice.task(f"loading {len(uris)} adapters from the registry", len(uris), "adapters") as advance:
            loaded = flavor.load_models(uris, base=base, settings=context.settings)
            advance(len(uris))
        names |= {subject.job.id: adapter.adapter_name for subject, adapter in zip(trained, loaded, strict=True)}
    return names


def _evaluate(
    context: Context, base: LoadedBase, table: Rows, adapters: Sequence[str | None], spec: Any
) -> dict[str | None, Evaluation]:
    examples, encoded = table.evaluated
    progress = _Stoppable(context)
    batch = min(MAX_ROWS, spec.per_device_eval_batch_size * len(set(adapters)))
    answers = greedy(base, max_new_tokens=spec.max_new_tokens, batch_size=batch, progress=progress)
    with keep_dequantized(base.model):
        return evaluate(base, adapters, examples, encoded, spec, generate=answers, progress=progress)


class _Stoppable:
    """Progress that ends the evaluation between two batches when the process is asked to stop."""

    def __init__(self, context: Context) -> None:
        self._context = context

    @contextmanager
    def task(self, description: str, total: int | None, unit: str = "B") -> Iterator[Advance]:
        with self._context.voice.task(description, total, unit) as advance:

            def move(amount: int) -> None:
                if self._context.stop.is_set():
                    raise KeyboardInterrupt
                advance(amount)

            yield move


def _publish(context: Context, subject: _Subject, table: Rows, evaluation: Evaluation) -> None:
    work, trained = subject.work, subject.trained
    values = to_tracking(evaluation.metrics)
    # The arm's last step, also where an earlier state was registered: MLflow shows the value of the highest step, and
    # evaluations during training have the same keys.
    step = int(trained["steps"]) if trained is not None else 0
    if trained is not None:
        run = context.store.resume_run(run_of_arm(context, work), system_metrics=False, repeats=False)
    elif subject.job.mlflow_run_id is not None:
        run = context.store.resume_run(subject.job.mlflow_run_id, system_metrics=False)
    else:
        run = context.store.start_run(
            work.experiment_id,
            work.run_name,
            parent=work.parent_run_id,
            params={
                "base_model": work.arm.base_model,
                "base_model_revision": work.arm.base_model_revision,
                **{key: value for key, value in work.arm.params.items() if key.startswith("quantization.")},
            },
            tags=collect().tags(),
            description=base_note(work.arm),
            kind="base",
            system_metrics=False,
        )
        context.queue.set_run(subject.token, run.run_id)
        run.input(table.inputs[-1])
    run.metrics(values, step)
    run.tags({EVAL_HASH: subject.job.spec_hash})
    names = list(work.arm.evaluation.metrics)
    run.table(prediction_rows(evaluation, names, log_examples=work.log_examples), "predictions.json")
    run.flush()
    if trained is not None:
        _link(context, run.run_id, trained, values, step, table)
    run.end("FINISHED")
    metrics = {key: metric.to_json() for key, metric in evaluation.metrics.items()}
    model_uri = None if trained is None else trained["model_uri"]
    result = {"metrics": metrics, "run_id": run.run_id, "model_uri": model_uri, "step": step}
    context.queue.finish(subject.token, Outcome.SUCCEEDED, result=result)


def _link(
    context: Context, run_id: str, trained: dict[str, Any], values: dict[str, float], step: int, table: Rows
) -> None:
    """Give the LoggedModel and the model version their results."""
    record = table.inputs[-1]
    link_metrics(
        context.store.client,
        run_id,
        trained["model_id"],
        list(values),
        step,
        dataset_name=record.name,
        dataset_digest=record.digest.rpartition(":")[2][:36],
    )
    resolved = context.store.registry.resolve(trained["model_uri"])
    if resolved.version is not None:
        shown = {key: repr(value) for key, value in values.items() if not key.endswith(".n")}
        context.store.registry.tag_version(resolved.version.name, resolved.version.version, shown)
