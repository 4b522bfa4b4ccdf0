from __future__ import annotations

import json

import pytest
from pydantic import TypeAdapter

from rankwise.inference.source import Source, Survey
from rankwise.reporter import SILENT
from rankwise.settings import Settings

READ = {"int": int, "float": float}


def survey(path, model_column):
    return Source(path, Settings.load()).survey(path.with_name("out.jsonl"), model_column, 256, SILENT)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-2", "0"], "int"),
        (["1", "2.5", ""], "float"),
        (["1e-3", ".5", "5."], "float"),
        (["007", "1"], None),
        (["1", "a"], None),
        (["nan"], None),
        (["."], None),
        (["9" * 5000], None),
    ],
)
def test_columns_of_csv_in_which_every_cell_is_a_number(tmp_path, cells, kind):
    path = tmp_path / "rows.csv"
    path.write_text("n,m\n" + "".join(f"{cell},x\n" for cell in cells))
    found = survey(path, "model")
    assert found.numbers.get("n") == kind
    assert found.typed({"n": cells[0], "m": "x"}) == {"n": READ[kind](cells[0]) if kind else cells[0], "m": "x"}


def test_rows_columns_and_models_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1, "model": "m"}\nbroken\n{"a": 1.5, "b": null, "model": ""}\n{"a": "x", "model": "m"}\n')
    found = survey(path, "model")
    assert (found.rows, found.models, found.unnamed) == (4, {"m": 2}, 1)
    assert list(found.columns) == ["a", "model", "b"]
    assert found.columns["a"] == {"float", "int", "str"}
    assert TypeAdapter(Survey).validate_json(json.dumps(found.to_json()), strict=True) == found
