from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.tiny import make_base
from safetensors import safe_open

from rankwise.exceptions import AdapterIntegrityError, BaseMismatchError, ConfigError, TrackingError
from rankwise.modeling.fingerprint import check_manifest, write_manifest
from rankwise.serving import adapters as module
from rankwise.serving.adapters import ALIAS_TTL_S, REFUSAL_TTL_S, AdapterResolver
from rankwise.serving.vllm_options import VllmOptions

URI = "models:/served@champion"


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def adapters(world, clock, client):
    return AdapterResolver(world.settings, VllmOptions(max_rank=16), clock=clock)


def test_an_adapter_is_given_as_the_files_that_the_loader_reads(world, adapters):
    served = adapters.find(str(world.base_path), URI)
    assert served.uri == "models:/served/1"
    assert served.number > 0
    check_manifest(served.directory)
    config = json.loads((served.directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    with safe_open(str(served.directory / "adapter_model.safetensors"), framework="pt") as file:
        names = list(file.keys())
    assert names
    assert all(name.startswith("base_model.model.model.layers.") for name in names)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert not list(served.directory.glob("*.bin"))


def test_an_alias_that_moves_is_seen_after_the_time_to_live_and_has_a_path_of_its_own(world, adapters, clock, client):
    first = adapters.find(str(world.base_path), URI)
    client.set_registered_model_alias("served", "champion", "2")
    clock.now = ALIAS_TTL_S - 1
    assert adapters.find(str(world.base_path), URI) == first
    clock.now = ALIAS_TTL_S
    second = adapters.find(str(world.base_path), URI)
    assert second.uri == "models:/served/2"
    assert second.directory != first.directory
    assert second.number != first.number
    check_manifest(first.directory)


def test_what_is_served_is_said_once_however_often_it_is_asked_for(world, adapters, clock, client, caplog):
    caplog.set_level("INFO", module.__name__)
    for _ in range(3):
        adapters.find(str(world.base_path), URI)
        clock.now += ALIAS_TTL_S
    assert caplog.text.count("models:/served@champion is models:/served/1, served from ") == 1
    client.set_registered_model_alias("served", "champion", "2")
    adapters.find(str(world.base_path), URI)
    assert caplog.text.count("models:/served@champion is models:/served/2, served from ") == 1


def test_a_version_of_a_model_that_was_deleted_and_made_anew_is_another_one(world, adapters, clock, client):
    client.copy_model_version("models:/served/1", "anew")
    first = adapters.find(str(world.base_path), "models:/anew/1")
    client.delete_registered_model("anew")
    client.copy_model_version("models:/served/2", "anew")
    clock.now = ALIAS_TTL_S
    second = adapters.find(str(world.base_path), "models:/anew/1")
    assert second.uri == first.uri
    assert second.number != first.number
    assert second.directory != first.directory
    check_manifest(first.directory)


def test_a_version_is_fetched_once_and_what_is_spoilt_in_the_cache_again(world, adapters, monkeypatch):
    fetched = []
    real = module.fetch
    monkeypatch.setattr(module, "fetch", lambda uri, store: fetched.append(uri) or real(uri, store))
    first = adapters.find(str(world.base_path), URI)
    adapters.find(str(world.base_path), "models:/served/1")
    assert fetched == ["models:/served/1"]
    weights = first.directory / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert adapters.find(str(world.base_path), URI).directory == first.directory
    assert weights.read_bytes() == content
    assert len(fetched) == 2


def test_a_directory_that_somebody_has_removed_is_made_again(world, adapters):
    first = adapters.find(str(world.base_path), URI)
    shutil.rmtree(first.directory)
    assert adapters.find(str(world.base_path), URI) == first
    check_manifest(first.directory)


def test_what_an_earlier_server_has_left_unwhole_is_made_again(world, adapters, client):
    first = adapters.find(str(world.base_path), URI)
    (first.directory / "adapter_config.json").write_text("{}")
    assert AdapterResolver(world.settings, VllmOptions(max_rank=16)).find(str(world.base_path), URI) == first
    check_manifest(first.directory)


def test_other_content_with_a_manifest_of_its_own_is_not_what_was_fetched(world, adapters):
    first = adapters.find(str(world.base_path), URI)
    weights = first.directory / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    write_manifest(first.directory)
    assert adapters.find(str(world.base_path), URI) == first
    assert weights.read_bytes() == content


def test_an_outage_of_mlflow_leaves_an_alias_where_it_was(world, adapters, clock, monkeypatch, caplog):
    first = adapters.find(str(world.base_path), URI)

    def away(uri, store):
        raise TrackingError("no answer")

    monkeypatch.setattr(module, "resolve_uri", away)
    clock.now = ALIAS_TTL_S
    assert adapters.find(str(world.base_path), URI) == first
    assert "MLflow is unavailable, it stays models:/served/1" in caplog.text
    with pytest.raises(TrackingError):
        adapters.find(str(world.base_path), "models:/served/2")


def test_another_base_is_refused_with_both_fingerprints(world, adapters, tmp_path):
    other = make_base(tmp_path / "other", seed=5)
    with pytest.raises(BaseMismatchError, match=r"weights: found sha256:\w+, trained on sha256"):
        adapters.find(str(other), URI)
    with pytest.raises(ConfigError, match="neither a directory nor an org/name"):
        adapters.find("/no/such/directory", "models:/served/2")


def test_a_rank_above_the_server_s_is_refused_with_the_option(world, client):
    few = AdapterResolver(world.settings, VllmOptions(max_rank=2))
    with pytest.raises(ConfigError, match="has r = 4, the server allows up to 2: start it with --max-lora-rank 8"):
        few.find(str(world.base_path), URI)


def test_a_refusal_holds_for_a_while_and_not_for_ever(world, adapters, clock, client, monkeypatch):
    asked = []
    real = module.resolve_uri
    monkeypatch.setattr(module, "resolve_uri", lambda uri, store: asked.append(uri) or real(uri, store))
    for _ in range(3):
        with pytest.raises(TrackingError):
            adapters.find(str(world.base_path), "models:/served@nobody")
    assert len(asked) == 1
    client.set_registered_model_alias("served", "nobody", "2")
    clock.now = REFUSAL_TTL_S
    assert adapters.find(str(world.base_path), "models:/served@nobody").uri == "models:/served/2"
    client.delete_registered_model_alias("served", "nobody")


def test_spoilt_artifacts_are_refused(world, tmp_path, client):
    version = client.get_model_version("served", "2")
    stored = client.get_model_version_download_uri(version.name, version.version).removeprefix("file://")
    path = Path(stored) / "adapter" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        fresh = AdapterResolver(replace(world.settings, cache=tmp_path / "cache"), VllmOptions())
        with pytest.raises(AdapterIntegrityError, match=r"adapter_model\.safetensors"):
            fresh.find(str(world.base_path), "models:/served/2")
    finally:
        path.write_bytes(content)
