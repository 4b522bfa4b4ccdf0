import mlflow
import pytest
import torch
from helpers.flavored import make_world


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Layers of 64 columns are slower on two threads than on one, and very slow beside another test process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
