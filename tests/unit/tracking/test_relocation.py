"""A home that was moved or copied."""

from __future__ import annotations

import shutil

import pytest
from helpers.local_store import prepared_home
from mlflow import MlflowClient

from rankwise.exceptions import ConfigError, TrackingError
from rankwise.settings import Settings
from rankwise.tracking import relocation
from rankwise.tracking.connection import connect
from rankwise.tracking.relocation import find_moved, relocate


def settings_of(home):
    return Settings.load({"RANKWISE_HOME": str(home), "RANKWISE_CACHE": str(home.parent / "cache")})


@pytest.fixture
def old(tmp_path):
    """A home with a run that has an artifact, and a version of a registered model."""
    settings = prepared_home(tmp_path / "old")
    client = connect(settings)
    experiment = client.create_experiment("e", artifact_location=(settings.artifacts / "e").as_uri())
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "first", "a.txt")
    client.create_registered_model("m")
    client.create_model_version("m", f"{run.info.artifact_uri}/a.txt", run.info.run_id)
    return settings


def read(client, name="a.txt"):
    (experiment,) = [each for each in client.search_experiments() if each.name == "e"]
    (run,) = client.search_runs([experiment.experiment_id])
    with open(client.download_artifacts(run.info.run_id, name)) as file:
        return run.info.run_id, file.read()


def _stored_locations(settings):
    with relocation._database(settings, write=False) as database:
        return list(relocation._stored(database))


def test_a_moved_home_is_refused_until_it_is_relocated(old, tmp_path):
    shutil.move(old.home, tmp_path / "new place")
    settings = settings_of(tmp_path / "new place")
    with pytest.raises(TrackingError, match=r"was moved or copied: .* names .*/old as the place of its artifacts"):
        connect(settings)
    assert not old.home.exists()
    found, backup = relocate(settings)
    # Two experiments, a run, a version's source and its storage location.
    assert found.moved == {old.home: 5}
    assert found.unknown == ()
    assert backup.is_file()
    client = connect(settings)
    assert read(client)[1] == "first"
    assert client.get_model_version("m", "1").source.startswith((tmp_path / "new place").as_uri())
    assert not old.home.exists()
    assert relocate(settings) == (find_moved(settings), None)


def test_a_relocated_copy_leaves_the_original_alone(old, tmp_path):
    shutil.copytree(old.home, tmp_path / "copy")
    settings = settings_of(tmp_path / "copy")
    relocate(settings)
    # Not through this process's client, which remembers where it wrote the artifacts of a run.
    stored = {location for _, _, _, location in _stored_locations(settings)}
    assert stored
    assert not [location for location in stored if str(old.home) in location]
    assert read(connect(old))[1] == "first"


def test_the_same_home_under_another_name_was_not_moved(old, tmp_path):
    (tmp_path / "link").symlink_to(old.home)
    assert read(connect(settings_of(tmp_path / "link")))[1] == "first"


def test_artifacts_that_were_never_in_the_home_stay_where_they_are(old, tmp_path):
    elsewhere = (tmp_path / "big disk" / "runs").as_uri()
    MlflowClient(old.tracking_uri).create_experiment("big", artifact_location=elsewhere)
    shutil.move(old.home, tmp_path / "new")
    found, _ = relocate(settings_of(tmp_path / "new"))
    assert found.unknown == (elsewhere,)
    (big,) = [each for each in connect(settings_of(tmp_path / "new")).search_experiments() if each.name == "big"]
    assert big.artifact_location == elsewhere


def test_only_the_store_of_a_home_is_relocated(old, tmp_path):
    with pytest.raises(ConfigError, match="has no MLflow store; set RANKWISE_HOME"):
        relocate(settings_of(tmp_path / "nothing"))
    server = Settings.load({"RANKWISE_HOME": str(old.home), "MLFLOW_TRACKING_URI": "http://localhost:1"})
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI names another store"):
        relocate(server)
