from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.tiny import make_base
from huggingface_hub import constants

from rankwise.assets.base import resolve_base
from rankwise.cli.main import main
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
from rankwise.settings import Settings


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _empty_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def run(capsys, *arguments):
    """What a command prints on stdout and stderr, and its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["bases", *map(str, arguments)])
    return (*capsys.readouterr(), caught.value.code)


def listed(capsys):
    out, _, code = run(capsys, "list", "--json")
    assert code == 0
    return json.loads(out)["bases"]


def test_a_base_is_added_listed_verified_and_removed_by_name(capsys, base):
    out, err, code = run(capsys, "add", base)
    assert code == 0
    path = Path(out.strip())
    assert "base_model_revision: sha256:" in err
    (entry,) = listed(capsys)
    assert (entry["name"], entry["kind"], entry["path"]) == (path.name, "added", str(path))
    assert run(capsys, "verify")[::2] == (f"{path.name}: ok\n", 0)
    assert run(capsys, "prune", "--all")[0] == ""
    assert listed(capsys) == [entry]
    out, err, code = run(capsys, "prune", path.name)
    assert (out, code) == (f"{path.name}\n", 0)
    assert err.startswith("freed ")
    assert listed(capsys) == []


def test_a_damaged_entry_is_named_and_the_exit_code_tells(capsys, base):
    path = Path(run(capsys, "add", base)[0].strip())
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    out, err, code = run(capsys, "verify", "--json")
    assert [(row["ok"], "was sha256:" in row["problem"]) for row in json.loads(out)["bases"]] == [(False, True)]
    assert f"damaged: {path.name}" in err
    assert code == 3


def test_quantized_bases_are_listed_and_those_of_other_libraries_are_pruned(capsys, base):
    settings = Settings.load()
    load_base(resolve_base(str(base), None, settings), QuantizationSpec(), settings)
    (entry,) = listed(capsys)
    assert entry["kind"] == "quantized"
    assert entry["source"] == str(base)
    assert run(capsys, "verify")[2] == 0
    assert run(capsys, "prune")[0] == ""
    record = Path(entry["path"]) / "entry.json"
    document = json.loads(record.read_text())
    document["key"]["libraries"]["torch"] = "1.0"
    record.write_text(json.dumps(document))
    out, err, _ = run(capsys, "prune", "--dry-run")
    assert (out, err) == (f"{entry['name']}\n", err)
    assert err.startswith("would free")
    assert listed(capsys) == [entry]
    run(capsys, "prune")
    assert listed(capsys) == []


def test_leftovers_of_dead_processes_are_pruned(capsys, base):
    settings = Settings.load()
    left = settings.cache / "bases" / ".gguf-x.tmp"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x" * 2000)
    assert listed(capsys) == []
    assert run(capsys, "prune")[1] == "freed 2.00 kB\n"
    assert not left.exists()


@pytest.mark.parametrize("command", ["verify", "prune"])
def test_an_unknown_name_is_a_usage_error(capsys, command):
    _, err, code = run(capsys, command, "nothing")
    assert "unknown bases: nothing; `rankwise bases list` shows the names" in err
    assert code == 2


def test_bases_elsewhere_are_listed_and_verified_and_never_pruned(capsys, base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "shelf" / "one")
    monkeypatch.setenv("RANKWISE_BASES", str(tmp_path / "shelf"))
    name = str(tmp_path / "shelf" / "one")
    (entry,) = listed(capsys)
    assert (entry["name"], entry["kind"], entry["revision"]) == (name, "listed", None)
    out, err, _ = run(capsys, "list")
    assert name in out
    assert "elsewhere (never pruned)" in err
    assert run(capsys, "verify")[::2] == (f"{name}: ok\n", 0)
    assert run(capsys, "prune", "--all")[0] == ""
    _, err, code = run(capsys, "prune", name)
    assert "unknown bases: " in err
    assert code == 2
    assert (tmp_path / "shelf" / "one" / "config.json").is_file()
