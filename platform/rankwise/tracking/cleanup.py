"""Find and remove what jobs have created in MLflow: versions, LoggedModels and runs.

Job numbers restart with every queue, and queues may share one MLflow store: job number and run id together identify
what a job created. Functions raise `TrackingError` if the store is unreachable or refuses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from rankwise.compat.mlflow import artifact_repository
from rankwise.tracking.connection import paged, tracking_errors
from rankwise.tracking.query import RunRecord, search_runs
from rankwise.tracking.registry import JOB, ModelVersion
from rankwise.tracking.run import REASON, Status, shorten

_PAGE = 100
_EXPERIMENTS = 1000


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """A LoggedModel that a job created; `ready` says whether its upload finished."""

    model_id: str
    job: int
    run_id: str
    ready: bool
    created_ms: int
    location: str


def versions_of_jobs(found: Iterable[ModelVersion]) -> dict[tuple[int, str], list[ModelVersion]]:
    """Return the versions of these that jobs created, by job number and run id, in their order; without copies."""
    versions: dict[tuple[int, str], list[ModelVersion]] = {}
    for version in found:
        job = version.tags.get(JOB, "")
        if job.isdecimal() and version.run_id is not None and not version.is_copy:
            versions.setdefault((int(job), version.run_id), []).append(version)
    return versions


def models_of_jobs(client: MlflowClient, experiment_ids: Collection[str]) -> list[JobModel]:
    """Return the LoggedModels in these experiments that jobs created."""
    if not experiment_ids:
        return []
    models = paged(
        "searching the logged models",
        lambda token: client.search_logged_models(sorted(experiment_ids), max_results=_PAGE, page_token=token),
    )
    return [job_model for model in models if (job_model := _of_job(model)) is not None]


def remove_version(client: MlflowClient, version: ModelVersion) -> None:
    """Delete a version from the registry; the LoggedModel behind it stays."""
    with tracking_errors(f"removing {version.uri}"):
        client.delete_model_version(version.name, str(version.version))


def model_bytes(client: MlflowClient, model: JobModel) -> int:
    """Return the total size of a LoggedModel's files, in bytes."""
    with tracking_errors(f"reading the files of {model.model_id}"):
        return _bytes(_repository(client, model), None)


def remove_model(client: MlflowClient, model: JobModel) -> None:
    """Delete a LoggedModel and its files. Files go first, so an interrupted removal is found again."""
    with tracking_errors(f"removing {model.model_id}"):
        _repository(client, model).delete_artifacts()
        client.delete_logged_model(model.model_id)


def open_runs(client: MlflowClient, experiment_ids: Collection[str]) -> list[RunRecord]:
    """Return the runs of these experiments that are RUNNING or SCHEDULED."""
    return [
        run
        for experiment_id in sorted(experiment_ids)
        for status in ("RUNNING", "SCHEDULED")
        for run in search_runs(client, experiment_id, status=status)
    ]


def open_sweeps(client: MlflowClient) -> dict[str, str]:
    """Return the sweep runs that are RUNNING or SCHEDULED: run id to experiment name."""
    experiments = paged(
        "listing the experiments",
        lambda token: client.search_experiments(max_results=_EXPERIMENTS, page_token=token),
    )
    names: dict[str, str] = {experiment.experiment_id: experiment.name for experiment in experiments}
    open_sweep_runs: dict[str, str] = {}
    for status in ("RUNNING", "SCHEDULED"):
        for run in search_runs(client, *names, kind="sweep", status=status):
            open_sweep_runs[run.run_id] = names[run.experiment_id]
    return open_sweep_runs


def close_run(client: MlflowClient, run_id: str, status: Status, reason: str | None, ended_ms: int) -> None:
    """Set the final status of a run whose writer no longer exists."""
    with tracking_errors(f"ending run {run_id}"):
        if reason:
            client.set_tag(run_id, REASON, shorten(reason, 2000))
        client.set_terminated(run_id, status=status, end_time=ended_ms)


def _of_job(model: LoggedModel) -> JobModel | None:
    job = model.tags.get(JOB, "")
    if not job.isdecimal() or not model.source_run_id:
        return None
    return JobModel(
        model_id=model.model_id,
        job=int(job),
        run_id=model.source_run_id,
        ready=str(model.status) == "READY",
        created_ms=model.creation_timestamp,
        location=model.artifact_location,
    )


def _repository(client: MlflowClient, model: JobModel) -> ArtifactRepository:
    return artifact_repository(model.location, client.tracking_uri)


def _bytes(repository: ArtifactRepository, path: str | None) -> int:
    return sum(
        _bytes(repository, info.path) if info.is_dir else int(info.file_size or 0)
        for info in repository.list_artifacts(path)
    )
