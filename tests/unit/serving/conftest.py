from __future__ import annotations

import shutil
from dataclasses import replace

import mlflow
import pytest
from helpers.flavored import make_world
from mlflow import MlflowClient


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A base with an adapter of r = 4 over it, registered twice as `served`; `champion` is version 1."""
    import rankwise.flavor as flavor

    world = make_world(tmp_path_factory.mktemp("serving"))
    world = replace(world, settings=replace(world.settings, cache=world.root / "cache"))
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(world.settings.tracking_uri)
    base = world.load_base()
    flavor.log_adapter(world.adapter, base, registered_model_name="served")
    other = world.root / "other"
    shutil.copytree(world.adapter, other)
    config = (other / "adapter_config.json").read_text()
    (other / "adapter_config.json").write_text(config.replace('"lora_alpha": 8', '"lora_alpha": 4'))
    assert (other / "adapter_config.json").read_text() != config
    flavor.log_adapter(other, base, registered_model_name="served")
    mlflow.set_tracking_uri(before)
    return world


@pytest.fixture
def client(world):
    client = MlflowClient(world.settings.tracking_uri)
    client.set_registered_model_alias("served", "champion", "1")
    return client
