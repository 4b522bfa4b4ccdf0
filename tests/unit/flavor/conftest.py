import mlflow
import pytest
from helpers.flavored import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("flavor"))


@pytest.fixture
def store(world):
    """MLflow's current store is that of the world, and no run is active."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)
