from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import rankwise
from rankwise.cli.examples import examples
from rankwise.cli.experiment import plan, validate
from rankwise.exceptions import ConfigError
from rankwise.experiment.experiment import load_experiment

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
NAMES = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def _empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(command, *arguments):
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_the_list_has_every_shipped_file_with_its_description():
    document = json.loads(run(examples, "--json").stdout)
    assert [example["name"] for example in document["examples"]] == NAMES
    assert "pricing a diamond" in document["examples"][0]["description"]
    assert all(name in run(examples).stdout for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_written_with_what_it_refers_to_and_has_the_same_arms(name, tmp_path):
    assert run(examples, name).stdout == f"{name}.yaml\n"
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    config = Path(load_experiment(EXPERIMENTS / f"{name}.yaml").spec.base_model_config).relative_to(EXPERIMENTS)
    assert written == sorted([Path(f"{name}.yaml"), Path("schema.json"), config])
    assert [path.read_bytes() for path in written] == [(EXPERIMENTS / path).read_bytes() for path in written]
    run(validate, f"{name}.yaml")
    assert json.loads(run(plan, f"{name}.yaml", "--json").stdout)["experiment"] == name
    shipped = load_experiment(EXPERIMENTS / f"{name}.yaml").arms
    assert [arm.spec_hash for arm in load_experiment(Path(f"{name}.yaml")).arms] == [arm.spec_hash for arm in shipped]


def test_another_place_may_be_chosen(tmp_path):
    document = json.loads(run(examples, "diamonds-rank", "--out", "new/mine.yaml", "--json").stdout)
    assert document["file"] == "new/mine.yaml"
    assert document["files"] == ["new/configs/smollm2-135m.json", "new/schema.json", "new/mine.yaml"]
    assert load_experiment(tmp_path / "new" / "mine.yaml").spec.name == "diamonds-rank"


def test_the_same_command_again_succeeds_and_a_changed_file_is_kept(tmp_path):
    run(examples, "diamonds-rank")
    run(examples, "diamonds-rank")
    (tmp_path / "diamonds-rank.yaml").write_text("mine")
    (tmp_path / "schema.json").unlink()
    with pytest.raises(ConfigError, match=r"files exist with other content: diamonds-rank\.yaml; move them away"):
        run(examples, "diamonds-rank")
    assert (tmp_path / "diamonds-rank.yaml").read_text() == "mine"
    assert not (tmp_path / "schema.json").exists()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=f"unknown example diamonds; examples: {', '.join(NAMES)}"):
        run(examples, "diamonds")


def test_a_place_without_a_name_is_a_usage_error():
    result = CliRunner().invoke(examples, ["--out", "x.yaml"])
    assert result.exit_code == 2
    assert "--out needs the NAME of an example" in result.output


def test_an_installed_package_has_the_examples_within_it(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "rankwise"
    package.mkdir(parents=True)
    monkeypatch.setattr(rankwise, "__file__", str(package / "__init__.py"))
    with pytest.raises(ConfigError, match="this installation of rankwise has no examples"):
        run(examples)
    (package / "examples").mkdir()
    (package / "examples" / "one.yaml").write_text((EXPERIMENTS / "llama-3.1-8b-rank.yaml").read_text())
    (package / "examples" / "configs").symlink_to(EXPERIMENTS / "configs")
    assert [example["name"] for example in json.loads(run(examples, "--json").stdout)["examples"]] == ["one"]
