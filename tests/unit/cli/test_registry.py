from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers.flavored import make_world

from rankwise.cli.registry import pull
from rankwise.exceptions import AssetError, TrackingError
from rankwise.modeling.fingerprint import check_manifest


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = make_world(tmp_path_factory.mktemp("pull"))
    world.register("pulled")
    return world


@pytest.fixture(autouse=True)
def _home(world, monkeypatch):
    world.enter(monkeypatch)


def test_pull_puts_the_files_at_the_root_and_prints_the_directory(tmp_path):
    target = tmp_path / "a" / "b"
    result = CliRunner().invoke(pull, ["models:/pulled@champion", str(target)], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == f"{target}\n"
    assert f"--enable-lora --max-lora-rank 8 --lora-modules pulled={target}" in result.stderr
    assert "so near ties may resolve differently." in result.stderr
    assert (target / "adapter_config.json").is_file()
    assert (target / "adapter_model.safetensors").is_file()
    check_manifest(target)


def test_pull_tells_programs_what_was_pulled_and_how_it_is_served(world, tmp_path):
    arguments = ["models:/pulled@champion", str(tmp_path / "a"), "--json"]
    found = json.loads(CliRunner().invoke(pull, arguments, catch_exceptions=False).stdout)
    assert (found["uri"], found["resolved"]) == ("models:/pulled@champion", "models:/pulled/1")
    assert found["vllm"]["arguments"][:2] == ["serve", str(world.base_path)]
    assert found["vllm"]["line"].startswith(f"vllm serve {world.base_path} --dtype bfloat16 ")
    assert found["vllm"]["obstacles"] == []


def test_pull_of_what_is_not_there_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(TrackingError, match="models:/pulled@nobody"):
        CliRunner().invoke(pull, ["models:/pulled@nobody", str(tmp_path / "x")], catch_exceptions=False)
    with pytest.raises(AssetError, match="there is no directory"):
        CliRunner().invoke(pull, [str(tmp_path / "no"), str(tmp_path / "x")], catch_exceptions=False)
    assert list(tmp_path.iterdir()) == []
