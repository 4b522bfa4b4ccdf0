from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers.flavored import make_world

from rankwise.cli.registry import _QUANTIZATIONS, import_
from rankwise.exceptions import ConfigError
from rankwise.flavor.imports import QUANTIZATIONS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("import"))


@pytest.fixture(autouse=True)
def _home(world, monkeypatch):
    world.enter(monkeypatch)


def test_import_tells_what_it_found_and_prints_the_version(world):
    arguments = [str(world.adapter), "--name", "adopted", "--base", str(world.base_path)]
    result = CliRunner().invoke(import_, arguments, catch_exceptions=False)
    assert result.stdout == "models:/adopted/1\n"
    assert "quantization_assumed: how the base was quantized in training is not recorded" in result.stderr
    arguments += ["--quantization", "fp4-single", "--json"]
    document = json.loads(CliRunner().invoke(import_, arguments, catch_exceptions=False).stdout)
    assert document["model_uri"] == "models:/adopted/2"
    assert document["quantization"] == "4 bit fp4 without double quantization"
    assert document["adapter"]["parameters"] == 1792
    assert [finding["code"] for finding in document["findings"]] == ["base_not_proven"]


def test_what_is_no_adapter_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="is neither a PEFT directory"):
        CliRunner().invoke(import_, [str(tmp_path), "--name", "x"], catch_exceptions=False)


def test_the_command_knows_all_quantizations():
    assert set(_QUANTIZATIONS) == set(QUANTIZATIONS)
