"""What jobs have put into MLflow: found by the tags that were set at creation, and taken away again.

Numbers of jobs begin anew with every queue, and several queues may share one MLflow: what a job has made is known by
the job's number and its run together, since only one queue has that run.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import LoggedModel
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from rankwise.compat.mlflow import artifact_repository
from rankwise.tracking.errors import paged, tracking_errors
from rankwise.tracking.query import RunRecord, search_runs
from rankwise.tracking.registry import JOB, ModelVersion, Registry
from rankwise.tracking.run import REASON, Status, shorten

_PAGE = 100
_EXPERIMENTS = 1000


@dataclass(frozen=True, kw_only=True)
class JobModel:
    """A LoggedModel that a job has made.

    Attributes:
        model_id: MLflow's (`m-...`).
        job: The job's number.
        run_id: The job's run.
        ready: Whether its upload was finished.
        created_ms: Milliseconds since 1970.
        location: Where its files are.
    """

    model_id: str
    job: int
    run_id: str
    ready: bool
    created_ms: int
    location: str


def versions_of_jobs(registry: Registry) -> dict[tuple[int, str], list[ModelVersion]]:
    """All versions of all registered models that jobs have made, by job and run, oldest first.

    A copy of a version has its tags and its run, and is of whoever made it.

    Raises:
        TrackingError: The store cannot be reached.
    """
    found: dict[tuple[int, str], list[ModelVersion]] = {}
    for version in registry.search():
        job = version.tags.get(JOB, "")
        if job.isdecimal() and version.run_id is not None and not version.is_copy:
            found.setdefault((int(job), version.run_id), []).append(version)
    return found


def models_of_jobs(client: MlflowClient, experiment_ids: Collection[str]) -> list[JobModel]:
    """The LoggedModels of experiments that jobs have made.

    Raises:
        TrackingError: The store cannot be reached.
    """
    if not experiment_ids:
        return []
    models = paged(
        "searching the logged models",
        lambda token: client.search_logged_models(sorted(experiment_ids), max_results=_PAGE, page_token=token),
    )
    return [job_model for model in models if (job_model := _of_job(model)) is not None]


def remove_version(client: MlflowClient, version: ModelVersion) -> None:
    """Take a version out of the registry; the LoggedModel behind it stays.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    with tracking_errors(f"removing {version.uri}"):
        client.delete_model_version(version.name, str(version.version))


def model_bytes(client: MlflowClient, model: JobModel) -> int:
    """How much the files of a LoggedModel hold.

    Raises:
        TrackingError: The artifact store cannot be reached.
    """
    with tracking_errors(f"reading the files of {model.model_id}"):
        return _bytes(_repository(client, model), None)


def remove_model(client: MlflowClient, model: JobModel) -> None:
    """Remove a LoggedModel with its files. Files first: what is cut off there is found again.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    with tracking_errors(f"removing {model.model_id}"):
        _repository(client, model).delete_artifacts()
        client.delete_logged_model(model.model_id)


def open_runs(client: MlflowClient, experiment_ids: Collection[str]) -> list[RunRecord]:
    """Runs of experiments that are RUNNING or SCHEDULED.

    Raises:
        TrackingError: The store cannot be reached.
    """
    return [
        run
        for experiment_id in sorted(experiment_ids)
        for status in ("RUNNING", "SCHEDULED")
        for run in search_runs(client, experiment_id, status=status)
    ]


def open_sweeps(client: MlflowClient) -> dict[str, str]:
    """The runs of sweeps that are RUNNING or SCHEDULED, each with the name of its experiment.

    Raises:
        TrackingError: The store cannot be reached.
    """
    experiments = paged(
        "listing the experiments",
        lambda token: client.search_experiments(max_results=_EXPERIMENTS, page_token=token),
    )
    names: dict[str, str] = {experiment.experiment_id: experiment.name for experiment in experiments}
    found: dict[str, str] = {}
    for status in ("RUNNING", "SCHEDULED"):
        for run in search_runs(client, *names, kind="sweep", status=status):
            found[run.run_id] = names[run.experiment_id]
    return found


def close_run(client: MlflowClient, run_id: str, status: Status, reason: str | None, ended_ms: int) -> None:
    """Say how a run has ended whose writer is gone.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
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
