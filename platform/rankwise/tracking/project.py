"""The MLflow side of the project backend: `mlflow run --backend rankwise` submits an experiment file."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import mlflow
from mlflow.entities import RunStatus
from mlflow.exceptions import ExecutionException
from mlflow.projects import SubmittedRun
from mlflow.projects.backend.abstract_backend import AbstractBackend

from rankwise.compat.mlflow import fetch_project
from rankwise.exceptions import RankwiseError
from rankwise.redact import redact
from rankwise.settings import Settings, set_process_defaults

logger = logging.getLogger(__name__)
EXPERIMENT = "experiment"
Status = Literal["SCHEDULED", "RUNNING", "FINISHED", "FAILED", "KILLED"]


class ProjectSubmission(Protocol):
    """A queued sweep; `run_id` is the run of the sweep."""

    run_id: str

    def wait(self) -> bool:
        """Wait until all jobs have ended; return whether all succeeded."""

    def status(self) -> Status:
        """Return the current status."""

    def cancel(self) -> None:
        """Cancel all jobs that have not ended, and wait until none is running."""


@dataclass(frozen=True, kw_only=True)
class ProjectRequest:
    """A request to submit `file`; `overrides` are `key.path=value` texts, `preflight` checks the rows first."""

    file: Path
    overrides: tuple[str, ...]
    priority: int
    preflight: bool


class ProjectRun(SubmittedRun):  # type: ignore[misc]
    """A submission as MLflow's `SubmittedRun`."""

    def __init__(self, submission: ProjectSubmission) -> None:
        super().__init__()
        self._submission = submission

    @property
    def run_id(self) -> str:
        """The run of the sweep."""
        return self._submission.run_id

    def wait(self) -> bool:
        """Wait for the end of the sweep; return whether all jobs succeeded."""
        with _mlflow_log_level():
            return self._submission.wait()

    def get_status(self) -> Any:
        """Return one of `mlflow.entities.RunStatus`."""
        return RunStatus.from_string(self._submission.status())

    def cancel(self) -> None:
        """Cancel all jobs that have not ended."""
        self._submission.cancel()


class ProjectBackend(AbstractBackend):  # type: ignore[misc]
    """Parses MLflow's arguments; a subclass submits."""

    @abstractmethod
    def submit(self, request: ProjectRequest, settings: Settings) -> ProjectSubmission:
        """Add a definition to the queue."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: Mapping[str, Any] | None,
        version: str | None,
        backend_config: Mapping[str, Any] | None,
        tracking_uri: str,
        experiment_id: str,
    ) -> ProjectRun:
        """Submit the experiment file that the parameter `experiment` names.

        Every `RankwiseError` becomes an `ExecutionException`, which MLflow's command line prints.

        Args:
            project_uri: A directory or a git repository; the file's path is relative to it. No MLproject is needed.
            entry_point: `main`; there is no other.
            params: `experiment`, and `key.path` with its value for each override.
            version: The version of a git repository.
            backend_config: `priority` (0) and `preflight` (true).
            tracking_uri: MLflow's store. If rankwise uses another one, MLflow is switched to that.
            experiment_id: Ignored: the definition's name is its experiment.
        """
        set_process_defaults()
        try:
            settings = Settings.load()
            request = _request(project_uri, entry_point, params or {}, version, backend_config or {})
            if settings.tracking_uri != tracking_uri:
                # MLflow sets tags on the run next, in its current store.
                logger.warning(
                    "the run is in the store %s; set MLFLOW_TRACKING_URI to it to see the run",
                    redact(settings.tracking_uri),
                )
                mlflow.set_tracking_uri(settings.tracking_uri)
            with _mlflow_log_level():
                submission = self.submit(request, settings)
            # A child of MLflow's logger, so that MLflow's command line shows the line.
            logging.getLogger("mlflow.rankwise").info(
                "=== Run (ID '%s') is queued: `rankwise worker` runs it, `rankwise status` shows its state ===",
                submission.run_id,
            )
            return ProjectRun(submission)
        except RankwiseError as error:
            raise ExecutionException(redact(str(error))) from error


@contextmanager
def _mlflow_log_level() -> Iterator[None]:
    """Keep MLflow's log level, which `connect` raises: here its lines are the command's output."""
    mlflows = logging.getLogger("mlflow")
    before = mlflows.level
    try:
        yield
    finally:
        mlflows.setLevel(before)


def _request(
    uri: str, entry_point: str, params: Mapping[str, Any], version: str | None, config: Mapping[str, Any]
) -> ProjectRequest:
    if entry_point != "main":
        raise ExecutionException(f"the only entry point of the rankwise backend is 'main', got {entry_point!r}")
    if EXPERIMENT not in params:
        raise ExecutionException(f"the parameter {EXPERIMENT!r} is missing; add -P {EXPERIMENT}=experiments/NAME.yaml")
    priority = config.get("priority", 0)
    if not isinstance(priority, int):
        raise ExecutionException(f"backend_config: priority must be a whole number, got {priority!r}")
    return ProjectRequest(
        file=fetch_project(uri, version) / str(params[EXPERIMENT]),
        overrides=tuple(f"{key}={value}" for key, value in params.items() if key != EXPERIMENT),
        priority=priority,
        preflight=bool(config.get("preflight", True)),
    )
