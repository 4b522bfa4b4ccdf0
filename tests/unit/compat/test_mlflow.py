"""The private names of mlflow, and its undocumented tags, files and routes, do what rankwise relies on."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy
import pandas as pd
import pytest
import yaml
from helpers.local_store import prepared_home
from mlflow import MlflowClient
from mlflow.exceptions import ExecutionException, MlflowException
from mlflow.models import Model
from mlflow.utils import mlflow_tags
from packaging.version import Version

from rankwise.compat import mlflow as compat
from rankwise.modeling.base import expected_warning

with expected_warning(compat.PYFUNC_IMPORT_WARNING):
    import mlflow.pyfunc

NUMPY = f"numpy=={numpy.__version__}"
MLFLOW = f"mlflow=={mlflow.__version__}"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The URI of a fresh local store, which is MLflow's current one."""
    uri = prepared_home(tmp_path / "store").tracking_uri
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    with compat.current_store(uri):
        yield uri


def test_an_example_is_stored_and_described_and_nothing_is_loaded(tmp_path):
    model = Model()
    compat.save_example(model, {"messages": [{"role": "user", "content": "x"}]}, tmp_path)
    model.save(str(tmp_path / "MLmodel"))
    again = Model.load(str(tmp_path))
    assert again.load_input_example(str(tmp_path)) == {"messages": [{"role": "user", "content": "x"}]}
    assert again.flavors == {}
    assert {path.name for path in tmp_path.iterdir()} == {"MLmodel", "input_example.json", "serving_input_example.json"}


def test_no_example_is_none(tmp_path):
    model = Model()
    compat.save_example(model, None, tmp_path)
    assert model.saved_input_example_info is None
    assert list(tmp_path.iterdir()) == []


def test_requirements_are_combined_as_mlflow_does():
    assert compat.combined_requirements([MLFLOW, NUMPY], None, None) == ([MLFLOW, NUMPY], [])
    assert compat.combined_requirements([MLFLOW], None, [NUMPY]) == ([MLFLOW, NUMPY], [])
    assert compat.combined_requirements(None, [NUMPY], None) == ([MLFLOW, NUMPY], [])


def test_constraints_come_apart_from_requirements(tmp_path):
    (tmp_path / "own.txt").write_text(f"{NUMPY}\n")
    requirements, constraints = compat.combined_requirements(None, [MLFLOW, f"-c {tmp_path / 'own.txt'}"], None)
    assert requirements == [MLFLOW, "-c constraints.txt"]
    assert constraints == [NUMPY]


def test_a_conda_environment_has_this_python_and_the_requirements_alone():
    content = compat.conda_environment([NUMPY])
    python, pip, requirements = content["dependencies"]
    assert python == f"python={'.'.join(map(str, sys.version_info[:3]))}"
    assert pip.startswith("pip<=")
    assert requirements == {"pip": [NUMPY]}
    assert set(content) == {"name", "channels", "dependencies"}


def test_a_python_environment_names_this_python_and_the_file_of_requirements(tmp_path):
    compat.write_python_environment(tmp_path / "python_env.yaml")
    content = yaml.safe_load((tmp_path / "python_env.yaml").read_text())
    assert content["python"] == ".".join(map(str, sys.version_info[:3]))
    assert content["dependencies"] == ["-r requirements.txt"]
    assert any(line.startswith("pip==") for line in content["build_dependencies"])


@pytest.mark.parametrize("variable", [None, "sqlite:////nowhere/own.db"])
def test_a_current_store_and_the_environment_come_back(monkeypatch, variable):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if variable is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    before = mlflow.get_tracking_uri()
    with suppress(KeyError), compat.current_store("sqlite:////nowhere/other.db"):
        assert mlflow.get_tracking_uri() == "sqlite:////nowhere/other.db"
        raise KeyError
    assert mlflow.get_tracking_uri() == before
    assert os.environ.get("MLFLOW_TRACKING_URI") == variable


def test_no_store_leaves_the_current_one(store):
    with compat.current_store(None):
        assert mlflow.get_tracking_uri() == store


def test_the_registry_looks_models_up_in_the_current_store(store, tmp_path):
    """The reason for `current_store`: a client of a store is not enough."""
    other = prepared_home(tmp_path / "other").tracking_uri
    client = MlflowClient(tracking_uri=other, registry_uri=other)
    model = client.create_logged_model("0", name="x")
    client.create_registered_model("x")
    with pytest.raises(MlflowException, match="not found"):
        client.create_model_version("x", f"models:/{model.model_id}", model_id=model.model_id)
    with compat.current_store(other):
        client.create_model_version("x", f"models:/{model.model_id}", model_id=model.model_id)
    assert [str(version.version) for version in client.search_model_versions("name = 'x'")] == ["1"]


def test_the_current_experiment_is_the_one_that_a_run_would_have(store, monkeypatch):
    assert compat.current_experiment_id() == "0"
    made = MlflowClient().create_experiment("of the environment")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", made)
    assert compat.current_experiment_id() == made
    chosen = mlflow.set_experiment("chosen").experiment_id
    assert compat.current_experiment_id() == chosen
    with mlflow.start_run() as run:
        assert run.info.experiment_id == chosen


def test_a_project_is_its_directory_or_one_below_it(tmp_path):
    (tmp_path / "below").mkdir()
    assert compat.fetch_project(str(tmp_path), None) == tmp_path
    assert compat.fetch_project(f"{tmp_path}#below", None) == tmp_path / "below"
    with pytest.raises(ExecutionException, match="subdirectory"):
        compat.fetch_project(f"{tmp_path}#other", None)
    with pytest.raises(ExecutionException, match="version"):
        compat.fetch_project(str(tmp_path), "main")


def test_a_project_in_a_repository_is_checked_out_at_its_version(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    # git itself takes the address of a host for a directory here.
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{repository}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://git.invalid/project.git")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(repository)]
    subprocess.run(["git", "init", "-q", "-b", "main", str(repository)], check=True)
    for content in ("first", "second"):
        (repository / "file").write_text(content)
        subprocess.run([*git, "add", "file"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", content], check=True)
        subprocess.run([*git, "tag", content], check=True)
    fetched = compat.fetch_project("https://git.invalid/project.git", "first")
    assert (fetched / "file").read_text() == "first"


def test_credentials_come_from_the_environment_and_else_from_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    assert compat.tracking_credentials() == (None, None)
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = filed\nmlflow_tracking_password = secret\n"
    )
    assert compat.tracking_credentials() == ("filed", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "set")
    assert compat.tracking_credentials() == ("set", "secret")


def test_files_of_an_artifact_store_are_written_listed_read_and_deleted(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("content")
    repository = compat.artifact_repository((tmp_path / "store").as_uri(), None)
    repository.log_artifact(str(file), "folder")
    (folder,) = repository.list_artifacts()
    assert (folder.path, folder.is_dir) == ("folder", True)
    (entry,) = repository.list_artifacts("folder")
    assert (entry.path, entry.is_dir, entry.file_size) == ("folder/file.txt", False, 7)
    (tmp_path / "back").mkdir()
    back = repository.download_artifacts("folder/file.txt", dst_path=str(tmp_path / "back"))
    assert Path(back).read_text() == "content"
    assert compat.local_directory(repository) == tmp_path / "store"
    repository.delete_artifacts()
    assert not (tmp_path / "store" / "folder").exists()


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9/artifacts", "s3://bucket/path"])
def test_other_artifact_stores_have_no_directory(uri):
    assert compat.local_directory(compat.artifact_repository(uri, "http://127.0.0.1:9")) is None


def test_tags_are_those_that_mlflow_itself_sets():
    assert compat.DATASET_CONTEXT == mlflow_tags.MLFLOW_DATASET_CONTEXT
    assert compat.LOGGED_ARTIFACTS == mlflow_tags.MLFLOW_LOGGED_ARTIFACTS
    assert compat.MODEL_VERSIONS == mlflow_tags.MLFLOW_MODEL_VERSIONS


def test_tables_are_noted_as_log_table_notes_them(store):
    with mlflow.start_run() as run:
        mlflow.log_table({"a": [1]}, "table.json")
    tags = MlflowClient().get_run(run.info.run_id).data.tags
    assert json.loads(tags[compat.LOGGED_ARTIFACTS]) == [{"path": "table.json", "type": "table"}]


@pytest.mark.parametrize(
    "text", [compat.EXPERIMENT_KIND, compat.TRAINING_KIND, compat.SHARED_VIEW.rstrip("."), "viewStateShareKey"]
)
def test_the_ui_knows_tags_that_only_it_reads(text):
    scripts = (Path(mlflow.__file__).parent / "server" / "js" / "build" / "static" / "js").glob("*.js")
    assert any(text in script.read_text() for script in scripts)


def test_the_schema_of_a_data_set_has_mlflow_s_form():
    table = pd.DataFrame({"prompt": ["x"], "carat": [0.5]})
    document = mlflow.data.from_pandas(table, digest="x").to_dict()
    assert json.loads(document["schema"]) == {
        compat.DATASET_COLUMNS: [
            {"type": "string", "name": "prompt", "required": True},
            {"type": "double", "name": "carat", "required": True},
        ]
    }


@pytest.fixture
def registered(store, tmp_path, monkeypatch):
    """Version 1 of the model `x`, with a loader that returns the URI it finds and that of a directory nobody loads."""

    class Loaded:
        def __init__(self, path):
            self.uri = compat.requested_uri(Path(path))
            self.other = compat.requested_uri(Path(path, "other"))

        def predict(self, data, params=None):
            return []

        def get_raw_model(self):
            return self

    monkeypatch.setitem(sys.modules, "loader_of_x", SimpleNamespace(_load_pyfunc=Loaded))
    (tmp_path / "model").mkdir()
    model = Model()
    mlflow.pyfunc.add_to_model(model, loader_module="loader_of_x")
    model.save(str(tmp_path / "model" / "MLmodel"))
    client = MlflowClient()
    logged = client.create_logged_model("0", name="x")
    client.log_model_artifacts(logged.model_id, str(tmp_path / "model"))
    client.finalize_logged_model(logged.model_id, "READY")
    client.create_registered_model("x")
    client.create_model_version("x", f"models:/{logged.model_id}", model_id=logged.model_id)
    client.set_registered_model_alias("x", "best", "1")
    return logged.model_id


def test_mlflow_3_17_notes_the_name_of_a_downloaded_version(registered, tmp_path):
    directory = Path(mlflow.artifacts.download_artifacts("models:/x/1", dst_path=str(tmp_path / "down")))
    note = directory / compat.DOWNLOAD_NOTE
    if Version(mlflow.__version__) < Version("3.18"):
        assert yaml.safe_load(note.read_text()) == {"model_name": "x", "model_version": "1"}
    else:
        assert not note.exists()


@pytest.mark.parametrize("uri", ["models:/x/1", "models:/x@best", "models:/{}", "{directory}"])
def test_the_uri_given_to_load_model_is_found_for_the_directory_that_it_loads(registered, tmp_path, uri):
    """mlflow.pyfunc gives a flavor the directory alone: without the URI, the registered name is not checked."""
    uri = uri.format(registered, directory=tmp_path / "model")
    loaded = mlflow.pyfunc.load_model(uri).get_raw_model()
    assert (loaded.uri, loaded.other) == (uri, None)


def test_there_is_no_requested_uri_outside_a_call_of_mlflow(tmp_path):
    def load_model(model_uri, data_path):
        return compat.requested_uri(Path(data_path))

    assert load_model("models:/x/1", str(tmp_path)) is None


def test_a_uri_names_a_version_or_a_logged_model(registered):
    version = compat.RequestedModel(name="x", version="1")
    for uri in ("models:/x/1", "models:/x/1/", "models:/x@best", "models:/x/latest", "models:/x/None"):
        assert compat.requested_model(uri) == version
    assert compat.requested_model(f"models:/{registered}") == compat.RequestedModel(model_id=registered)
    for uri in ("runs:/0123/x", "/models/x", "file:///models/x", "s3://models/x"):
        assert compat.requested_model(uri) is None
    with pytest.raises(MlflowException, match="worst"):
        compat.requested_model("models:/x@worst")


def test_a_database_of_another_release_is_known_by_the_message(tmp_path):
    settings = prepared_home(tmp_path / "old")
    with closing(sqlite3.connect(settings.home / "mlflow.db")) as database, database:
        # The first of MLflow's migrations.
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    with pytest.raises(MlflowException, match=compat.SCHEMA_OUT_OF_DATE):
        MlflowClient(tracking_uri=settings.tracking_uri).search_experiments(max_results=1)


IMPORTS = """
import json, re, sys, warnings
import mlflow
warnings.simplefilter("error")
try:
    import mlflow.pyfunc
except UserWarning as error:
    print(json.dumps(str(error)))
warnings.filterwarnings("ignore", message=re.escape(sys.argv[1]) + r"\\Z")
import mlflow.pyfunc
"""


def test_importing_pyfunc_causes_the_known_warning_and_no_other():
    python = str(Path(sys.prefix, "bin", "python"))
    command = [python, "-c", IMPORTS, compat.PYFUNC_IMPORT_WARNING]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == compat.PYFUNC_IMPORT_WARNING


@pytest.mark.parametrize("enabled", [True, False])
def test_a_server_says_by_its_answer_to_an_incomplete_job_whether_it_runs_jobs(monkeypatch, store, enabled):
    from fastapi import HTTPException
    from mlflow.server.job_api import SubmitJobPayload, job_api_router

    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", str(enabled).lower())
    (route,) = [route for route in job_api_router.routes if route.path == compat.JOBS_ROUTE and "POST" in route.methods]
    with pytest.raises(HTTPException) as refused:
        route.endpoint(SubmitJobPayload(**compat.INCOMPLETE_JOB), SimpleNamespace(state=SimpleNamespace()))
    assert compat.executes_jobs(refused.value.status_code, refused.value.detail) is enabled


@pytest.mark.parametrize(("status", "executes"), [(404, False), (405, False), (401, None), (200, None)])
def test_other_answers_say_that_there_is_no_such_route_or_nothing(status, executes):
    assert compat.executes_jobs(status, "") is executes
