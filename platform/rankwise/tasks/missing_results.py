"""Succeeded jobs whose results MLflow does not have: the store was lost or replaced, or somebody deleted them.

The queue is the truth about work, MLflow holds its results: what the queue counts as succeeded must exist there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.redact import redact
from rankwise.settings import Settings
from rankwise.tasks.predict import EXPERIMENT as PREDICTIONS
from rankwise.tracking.presence import present_models, present_runs
from rankwise.tracking.registry import JOB, ModelVersion
from rankwise.tracking.store import Store

_MOST_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class MissingResult:
    """A succeeded job, and which of `run`, `model` and `version` MLflow does not have for it.

    `deleted` says that the run is only marked as deleted, so that MLflow can restore it.
    """

    job: Job
    run_id: str
    parts: tuple[str, ...]
    deleted: bool = False

    def to_json(self) -> dict[str, Any]:
        """The entry of `rankwise sync --json`."""
        return {
            "job": self.job.id,
            "kind": str(self.job.kind),
            "experiment": self.job.experiment,
            "run_id": self.run_id,
            "model_uri": (self.job.result or {}).get("model_uri"),
            "missing": list(self.parts),
            "deleted": self.deleted,
        }


def missing_results(store: Store, jobs: Iterable[Job], versions: Sequence[ModelVersion]) -> list[MissingResult]:
    """The succeeded jobs of which MLflow lacks something, by id. `versions` are all versions of the registry.

    Raises:
        TrackingError: The store is unreachable.
    """
    succeeded = [job for job in jobs if job.state is JobState.SUCCEEDED]
    run_ids = {job.id: run_id for job in succeeded if (run_id := _run_of(job)) is not None}
    experiments = {str(job.spec["experiment_id"]) for job in succeeded if "experiment_id" in job.spec}
    if any(job.kind is JobKind.PREDICT for job in succeeded):
        predictions = store.find_experiment(PREDICTIONS)
        experiments |= {predictions} if predictions is not None else set()
    active = present_runs(store.client, experiments, run_ids.values())
    results = {job.id: job.result or {} for job in succeeded if job.kind is JobKind.TRAIN}
    model_ids = {str(result["model_id"]) for result in results.values() if result.get("model_id")}
    models = present_models(store.client, experiments, model_ids)
    # A version may have been registered again, or under another name.
    uris = {version.uri for version in versions}
    of_models = {version.model_id for version in versions}
    of_jobs = {(version.tags.get(JOB), version.run_id) for version in versions}
    missing = []
    for job in succeeded:
        if (run_id := run_ids.get(job.id)) is None:
            continue
        parts = [] if active.get(run_id) else ["run"]
        result = results.get(job.id, {})
        model_id, uri = result.get("model_id"), str(result.get("model_uri", ""))
        if model_id and model_id not in models:
            parts.append("model")
        registered = uri.startswith("models:/") and "/" in uri.removeprefix("models:/")
        if registered and not (uri in uris or model_id in of_models or (str(job.id), run_id) in of_jobs):
            parts.append("version")
        if parts:
            missing.append(
                MissingResult(job=job, run_id=run_id, parts=tuple(parts), deleted=active.get(run_id) is False)
            )
    return missing


def jobs_to_repeat(jobs: Iterable[Job], missing: Sequence[MissingResult]) -> list[int]:
    """The ids of the jobs to repeat: those of which something is missing, and the evaluations of their adapters."""
    ids, run_ids = {result.job.id for result in missing}, {result.run_id for result in missing}
    return sorted(ids | {job.id for job in jobs if job.state is JobState.SUCCEEDED and _run_of(job) in run_ids})


def describe_missing(missing: Sequence[MissingResult], settings: Settings) -> list[str]:
    """What is missing, a line for each experiment and kind of job, and how to restore it."""
    if not missing:
        return []
    store = redact(settings.tracking_uri)
    groups: dict[tuple[str, str, tuple[str, ...], bool], list[MissingResult]] = {}
    for result in missing:
        key = (result.job.experiment, str(result.job.kind), result.parts, result.deleted)
        groups.setdefault(key, []).append(result)
    lines = [_group_line(experiment, kind, parts, deleted, results, store)
             for (experiment, kind, parts, deleted), results in groups.items()]  # fmt: skip
    return [*lines, *_advice(missing, settings)]


def _group_line(
    experiment: str, kind: str, parts: tuple[str, ...], deleted: bool, results: Sequence[MissingResult], store: str
) -> str:
    ids = ", ".join(str(result.job.id) for result in results[:_MOST_NAMED])
    more = f" and {len(results) - _MOST_NAMED} more" if len(results) > _MOST_NAMED else ""
    jobs = f"{len(results)} succeeded {kind} jobs" if len(results) > 1 else f"1 succeeded {kind} job"
    state = "is deleted" if deleted else "is missing"
    what = {"run": f"run {state}", "model": "model is missing", "version": "version is missing"}
    return f"{experiment}: {jobs} ({ids}{more}): the {', the '.join(what[part] for part in parts)} in {store}"


def _advice(missing: Sequence[MissingResult], settings: Settings) -> list[str]:
    lines = []
    if all("run" in result.parts and not result.deleted for result in missing) and settings.local_store:
        lines.append(
            f"if {settings.home / 'mlflow.db'} was deleted or replaced: put a copy of it back (an upgrade leaves "
            "one, mlflow.db.*.bak), then run `rankwise sync`"
        )
    if deleted := next((result for result in missing if result.deleted), None):
        lines.append(
            f"a deleted run comes back with `MLFLOW_TRACKING_URI={redact(settings.tracking_uri)} mlflow runs restore "
            f"--run-id {deleted.run_id}`"
        )
    if unregistered := next((result for result in missing if result.parts == ("version",)), None):
        result = unregistered.job.result or {}
        name = str(result["model_uri"]).removeprefix("models:/").partition("/")[0]
        code = f"import mlflow; mlflow.register_model('models:/{result.get('model_id')}', '{name}')"
        lines.append(
            "a model without its version is registered again with "
            f'`MLFLOW_TRACKING_URI={redact(settings.tracking_uri)} python -c "{code}"`'
        )
    names = sorted({result.job.experiment for result in missing if result.job.kind is not JobKind.PREDICT})
    again = f", then `rankwise run FILE` with the definition of {', '.join(names)}" if names else ""
    lines.append(f"to do these jobs again: `rankwise sync --forget-missing`{again}")
    return lines


def _run_of(job: Job) -> str | None:
    run_id = (job.result or {}).get("run_id") or job.mlflow_run_id
    return None if run_id is None else str(run_id)
