"""MLflow's side of the project backend: what `mlflow run --backend rankwise` calls, and what it gets back."""

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


class Submission(Protocol):
    """A sweep in the queue.

    Attributes:
        run_id: The run of the sweep.
    """

    run_id: str

    def wait(self) -> bool:
        """Return when all jobs have ended: whether all of them succeeded."""

    def status(self) -> Status:
        """How it stands."""

    def cancel(self) -> None:
        """Cancel what has not ended, and wait until nothing is worked on any more."""


@dataclass(frozen=True, kw_only=True)
class ProjectRequest:
    """What was asked for.

    Attributes:
        file: The experiment file.
        overrides: `key.path=value` texts.
        priority: The higher one is claimed first.
        preflight: Whether rows are checked first.
    """

    file: Path
    overrides: tuple[str, ...]
    priority: int
    preflight: bool


class ProjectRun(SubmittedRun):  # type: ignore[misc]
    """A submission as MLflow knows submitted runs."""

    def __init__(self, submission: Submission) -> None:
        super().__init__()
        self._submission = submission

    @property
    def run_id(self) -> str:
        """The run of the sweep."""
        return self._submission.run_id

    def wait(self) -> bool:
        """Wait for the sweep's end, and say whether all of its jobs succeeded."""
        with _mlflow_as_loud():
            return self._submission.wait()

    def get_status(self) -> Any:
        """One of `mlflow.entities.RunStatus`."""
        return RunStatus.from_string(self._submission.status())

    def cancel(self) -> None:
        """Cancel what has not ended."""
        self._submission.cancel()


class ProjectBackend(AbstractBackend):  # type: ignore[misc]
    """Reads what MLflow hands over; a subclass submits."""

    @abstractmethod
    def submit(self, request: ProjectRequest, settings: Settings) -> Submission:
        """Put a definition into the queue."""

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

        Args:
            project_uri: A directory or a git repository; the file's path is relative to it. No MLproject is needed.
            entry_point: `main`; there is no other.
            params: `experiment`, and `key.path` with its value for each override.
            version: Of a git repository.
            backend_config: `priority` (0) and `preflight` (true).
            tracking_uri: MLflow's store, which becomes rankwise's where it is another one.
            experiment_id: Ignored: a definition's name is its experiment.

        Raises:
            ExecutionException: What `RankwiseError` says, as MLflow's command line shows it.
        """
        set_process_defaults()
        try:
            settings = Settings.load()
            request = _request(project_uri, entry_point, params or {}, version, backend_config or {})
            if settings.tracking_uri != tracking_uri:
                # MLflow sets tags on the run next, in the store that is its current one.
                logger.warning(
                    "the run is in %s; set MLFLOW_TRACKING_URI to it to look at it", redact(settings.tracking_uri)
                )
                mlflow.set_tracking_uri(settings.tracking_uri)
            with _mlflow_as_loud():
                submission = self.submit(request, settings)
            # A child of MLflow's logger: its command line shows these lines.
            logging.getLogger("mlflow.rankwise").info(
                "=== Run (ID '%s') is in the queue: rankwise worker does it, rankwise status shows ===",
                submission.run_id,
            )
            return ProjectRun(submission)
        except RankwiseError as error:
            raise ExecutionException(redact(str(error))) from error


@contextmanager
def _mlflow_as_loud() -> Iterator[None]:
    """Leave MLflow's own lines on stderr as they were (`connect` quiets them): here they are the command's answer."""
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
        raise ExecutionException(f"the backend rankwise has the entry point main only, got {entry_point!r}")
    if EXPERIMENT not in params:
        raise ExecutionException(f"name the experiment file: -P {EXPERIMENT}=experiments/NAME.yaml")
    priority = config.get("priority", 0)
    if not isinstance(priority, int):
        raise ExecutionException(f"backend_config: priority is a whole number, got {priority!r}")
    return ProjectRequest(
        file=fetch_project(uri, version) / str(params[EXPERIMENT]),
        overrides=tuple(f"{key}={value}" for key, value in params.items() if key != EXPERIMENT),
        priority=priority,
        preflight=bool(config.get("preflight", True)),
    )
