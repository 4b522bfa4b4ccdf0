from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers.flavored import make_world

from rankwise.cli.registry import export


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("export"))


@pytest.fixture(autouse=True)
def _home(world, monkeypatch):
    world.enter(monkeypatch)


def test_export_states_the_choice_and_the_agreement_and_prints_the_directory(world, tmp_path):
    target = tmp_path / "a" / "merged"
    few = ["--format", "merged", "--max-new-tokens", "3"]
    result = CliRunner().invoke(export, [str(world.saved), str(target), *few], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout == f"{target}\n"
    text = " ".join(result.stderr.split())
    assert "is merged into the 4-bit base that the adapter was trained over, dequantized (nf4-dequantized, by" in text
    assert "equal greedy tokens" in text
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    arguments = [str(world.saved), str(target), *few, "--prompts", str(tmp_path / "p.txt"), "--sample", "2", "--json"]
    result = CliRunner().invoke(export, arguments, catch_exceptions=False)
    document = json.loads(result.stdout)
    assert document["directory"] == str(target)
    assert document["agreement"]["prompts"] == 2
    assert json.loads((target / "rankwise_export.json").read_text())["agreement"] == document["agreement"]


def test_the_form_must_be_said(world, tmp_path):
    result = CliRunner().invoke(export, [str(world.saved), str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "Missing option '--format'" in result.stderr
