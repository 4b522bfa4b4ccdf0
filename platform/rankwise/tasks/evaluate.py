"""Evaluate a claimed pack: adapters out of the registry, and the bare base, on the same rows in mixed batches.

- One evaluation as every task makes it: greedy answers, rows of all adapters in shared batches, weights kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rankwise.flavor as flavor
from rankwise.evaluation.evaluate import MAX_ROWS, Evaluation, evaluate, prediction_rows
from rankwise.evaluation.gather import EVAL_HASH
from rankwise.evaluation.metrics import to_tracking
from rankwise.exceptions import JobError
from rankwise.experiment.schema import EvaluationSpec
from rankwise.jobs.job import Job, JobKind, Outcome
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.decoding.engine import greedy
from rankwise.modeling.lora.lean import keep_dequantized
from rankwise.modeling.lora.packed import delete_adapter
from rankwise.reporter import Reporter
from rankwise.tasks.context import Context, Work
from rankwise.tasks.rows import Rows, find_sources
from rankwise.tasks.session import Session, Stoppable, token_of
from rankwise.tasks.submit import run_of_arm
from rankwise.tracking.notes import base_note
from rankwise.tracking.provenance import collect
from rankwise.tracking.registry import link_metrics


def measure(
    base: LoadedBase, rows: Rows, adapters: Sequence[str | None], spec: EvaluationSpec, progress: Reporter
) -> dict[str | None, Evaluation]:
    """Evaluate adapters that are attached to the base, and the bare base (None), on the evaluation rows.

    Raises:
        ConfigError: A metric is not known, or a prompt does not fit.
    """
    examples, encoded = rows.evaluated
    batch = min(MAX_ROWS, spec.per_device_eval_batch_size * len(set(adapters)))
    answers = greedy(base, max_new_tokens=spec.max_new_tokens, batch_size=batch, progress=progress)
    with keep_dequantized(base.model):
        return evaluate(base, adapters, examples, encoded, spec, generate=answers, progress=progress)


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """What one job evaluates: the adapter of a trained arm, or the bare base."""

    job: Job
    token: str
    work: Work
    trained: dict[str, Any] | None


def evaluate_claimed(session: Session, jobs: Sequence[Job]) -> None:
    """Evaluate the jobs of one claim over one base and report the end of each of them.

    Adapters are loaded by their registered URI, with all checks of the flavor, as any user would.

    Raises:
        RankwiseError: What a person has to mend.
        Exception: A bug.
    """
    context = session.context
    session.phase("load")
    subjects = [_subject(context, job, token_of(job)) for job in jobs]
    arm = subjects[0].work.arm
    sources = find_sources(arm, context.settings, context.voice)
    base = session.bases.get(sources.base, arm.quantization)
    session.phase("tokenize")
    table = session.rows.get(arm, sources, base.tokenizer)
    session.phase("evaluate")
    names = _attach(context, base, subjects)
    try:
        adapters = [names[subject.job.id] for subject in subjects]
        progress = Stoppable(session, [subject.token for subject in subjects])
        results = measure(base, table, adapters, arm.evaluation, progress)
    finally:
        for name in filter(None, names.values()):
            delete_adapter(base.model, name)
    session.phase("upload")
    for subject in subjects:
        if session.authority.cancelled(subject.token):
            session.report(subject.job, Outcome.CANCELLED)
        elif session.may_publish(subject.job):
            result = _publish(session, subject, table, results[names[subject.job.id]])
            session.report(subject.job, Outcome.SUCCEEDED, result=result)
        else:
            session.report(subject.job, Outcome.PREEMPTED)


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


def _publish(session: Session, subject: _Subject, table: Rows, evaluation: Evaluation) -> dict[str, Any]:
    """Write the results to the arm's run, its LoggedModel and its version; what the job's row is to keep of them."""
    context, work, trained = session.context, subject.work, subject.trained
    fence = session.fence(subject.job)
    values = to_tracking(evaluation.metrics)
    # The arm's last step, also where an earlier state was registered: MLflow shows the value of the highest step, and
    # evaluations during training have the same keys.
    step = int(trained["steps"]) if trained is not None else 0
    if trained is not None:
        run = context.store.resume_run(
            run_of_arm(context, work), system_metrics=False, repeats=False, fence=fence, restart=False
        )
    elif subject.job.mlflow_run_id is not None:
        run = context.store.resume_run(subject.job.mlflow_run_id, system_metrics=False, fence=fence)
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
    return {"metrics": metrics, "run_id": run.run_id, "model_uri": model_uri, "step": step}


def _link(
    context: Context, run_id: str, trained: dict[str, Any], values: dict[str, float], step: int, table: Rows
) -> None:
    """Give the LoggedModel and the model version their results."""
    link_metrics(context.store.client, run_id, trained["model_id"], list(values), step, dataset=table.inputs[-1])
    resolved = context.store.registry.resolve(trained["model_uri"])
    if resolved.version is not None:
        shown = {key: repr(value) for key, value in values.items() if not key.endswith(".n")}
        context.store.registry.tag_version(resolved.version.name, resolved.version.version, shown)
