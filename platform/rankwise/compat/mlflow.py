"""Private names of mlflow, and undocumented tags, files and routes. Checked with mlflow 3.17.2 and 3.18.0."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.models import Model
from mlflow.models.utils import _save_example
from mlflow.projects.utils import _fetch_project
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
from mlflow.store.artifact.utils.models import get_model_name_and_version
from mlflow.tracking._tracking_service.utils import _use_tracking_uri
from mlflow.utils.credentials import read_mlflow_creds
from mlflow.utils.environment import _mlflow_conda_env, _process_pip_requirements, _PythonEnv

# Tags that MLflow's UI and client give a meaning, beside the documented system tags.
EXPERIMENT_KIND = "mlflow.experimentKind"
"""Of an experiment: keeps the UI from asking what it is about."""
TRAINING_KIND = "custom_model_development"
"""Value of `EXPERIMENT_KIND`: training, in contrast to applications of language models."""
SHARED_VIEW = "mlflow.sharedViewState."
"""Of an experiment, followed by a key: a table view that a link with `viewStateShareKey=KEY` opens."""
DATASET_CONTEXT = "mlflow.data.context"
"""Of a run's input: what the run does with the data set."""
LOGGED_ARTIFACTS = "mlflow.loggedArtifacts"
"""Of a run: its tables, as the UI lists them."""
MODEL_VERSIONS = "mlflow.modelVersions"
"""Of a LoggedModel: the versions that it is registered as; the UI links them."""

DATASET_COLUMNS = "mlflow_colspec"
"""Key of the columns in the JSON schema of a data set; MLflow reads no other form."""

DOWNLOAD_NOTE = "registered_model_meta"
"""File that mlflow 3.17 writes into a downloaded model, with the registered name and version; 3.18 does not.

In a local store it stays in the stored model, where a later load under another name can find it: `requested_uri` is
newer.
"""

SCHEMA_OUT_OF_DATE = "out-of-date database schema"
"""In the message about a database of an older release. The error's code is that of any internal error."""

PYFUNC_IMPORT_WARNING = (
    "\x1b[1;33mAny type hint is inferred as AnyType, and MLflow doesn't validate the data for this type. Please use a "
    "more specific type hint to enable data validation.\x1b[0m"
)
"""Warning that the import of mlflow.pyfunc causes, about a class of its own."""

JOBS_ROUTE = "/ajax-api/3.0/jobs/"
"""Where a server takes jobs: an internal route of its UI. No public route says whether jobs are executed."""
INCOMPLETE_JOB: dict[str, Any] = {"job_name": "optimize_prompts", "params": {}}
"""A job that a server which executes jobs refuses before it stores anything, since parameters are missing."""


@dataclass(frozen=True, kw_only=True)
class RequestedModel:
    """The model that a `models:/` URI names: a version of a registered model, or a LoggedModel."""

    name: str | None = None
    version: str | None = None
    model_id: str | None = None


def requested_uri(directory: Path) -> str | None:
    """The URI given to the `mlflow.pyfunc.load_model` that is loading this directory; None outside such a call.

    MLflow passes only the directory to a flavor. The URI is a local variable of the calling function: a private detail
    of MLflow. A call that is loading another directory, such as that of a model around this one, does not count.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "mlflow.pyfunc" and frame.f_code.co_name == "load_model":
            values = frame.f_locals
            if Path(values.get("data_path") or "") == directory:
                return str(values["model_uri"])
        frame = frame.f_back
    return None


def requested_model(uri: str) -> RequestedModel | None:
    """The model that a `models:/` URI names now, in every form that MLflow takes; None for other URIs.

    Raises:
        mlflow.exceptions.MlflowException: There is no such alias, or no version in that stage.
    """
    if not ModelsArtifactRepository.is_models_uri(uri):
        return None
    root, _ = ModelsArtifactRepository.split_models_uri(uri)
    parts = get_model_name_and_version(MlflowClient(), root)
    if len(parts) == 1:
        return RequestedModel(model_id=parts[0])
    name, version = parts
    return RequestedModel(name=name, version=str(version))


def save_example(model: Model, example: Any, directory: Path) -> None:
    """Write an input example into a model directory, and describe it in the model.

    The public `Model.log` and `save_model(input_example=...)` then load the model to check the example: a second base
    in memory.
    """
    _save_example(model, example, str(directory))


def combined_requirements(
    default: list[str] | None, given: list[str] | None, extra: list[str] | None
) -> tuple[list[str], list[str]]:
    """Requirements and constraints of a model, from a flavor's own, those given in their place, and additional ones.

    Public functions infer requirements, but none combines them as `save_model` of MLflow's flavors does.
    """
    _, requirements, constraints = _process_pip_requirements(default, given, extra)
    return requirements, constraints


def conda_environment(requirements: list[str]) -> dict[str, Any]:
    """The content of a model's `conda.yaml`. No public function builds it."""
    environment: dict[str, Any] = _mlflow_conda_env(additional_pip_deps=requirements, install_mlflow=False)
    return environment


def write_python_environment(path: Path) -> None:
    """Write a model's `python_env.yaml`: this Python, and `requirements.txt` beside the file.

    No public function does it.
    """
    _PythonEnv.current().to_yaml(str(path))


@contextmanager
def current_store(uri: str | None) -> Iterator[None]:
    """Make a store MLflow's current one inside the block; None leaves the current one.

    MLflow's SQL registry looks LoggedModels up in the current store, whatever store its client is of. The public
    `set_tracking_uri` cannot undo itself: it has no value for "not set". The environment variable, which MLflow sets as
    well, is restored too.
    """
    if uri is None or uri == mlflow.get_tracking_uri():
        yield
        return
    before = MLFLOW_TRACKING_URI.get_raw()
    try:
        with _use_tracking_uri(uri):
            yield
    finally:
        if before is None:
            MLFLOW_TRACKING_URI.unset()
        else:
            MLFLOW_TRACKING_URI.set(before)


def current_experiment_id() -> str | None:
    """The experiment that a new run would belong to: of `set_experiment`, of the environment, or the default one.

    The public API tells the experiment of an active run only.
    """
    experiment_id: str | None = mlflow.tracking.fluent._get_experiment_id()
    return experiment_id


def fetch_project(uri: str, version: str | None) -> Path:
    """A local directory of an MLflow project: the directory itself, or a checkout of the repository at `version`.

    A project backend gets the URI and must fetch the project itself; no public function does it.

    Raises:
        mlflow.exceptions.ExecutionException: There is no such project or version.
    """
    return Path(_fetch_project(uri, version))


def tracking_credentials() -> tuple[str | None, str | None]:
    """User and password for a tracking server: of the environment, else of `~/.mlflow/credentials`.

    MLflow's client reads both; the public variables cover the environment only.
    """
    credentials = read_mlflow_creds()
    return credentials.username, credentials.password


def artifact_repository(uri: str, tracking_uri: str | None) -> ArtifactRepository:
    """The artifact store of a location, whose files can be listed, read, written and deleted.

    The public `MlflowClient` reaches artifacts of runs only, and deletes none.
    """
    return get_artifact_repository(uri, tracking_uri=tracking_uri)


def local_directory(repository: ArtifactRepository) -> Path | None:
    """The directory of an artifact store in the file system; None for other stores, which have no directories."""
    directory = getattr(repository, "artifact_dir", None)
    return None if directory is None else Path(directory)


def executes_jobs(status: int, answer: str) -> bool | None:
    """Whether a server executes jobs, by its answer to `INCOMPLETE_JOB` at `JOBS_ROUTE`; None where that is unknown."""
    if "not enabled" in answer or status in {404, 405}:
        return False
    return True if status in {400, 500} else None
