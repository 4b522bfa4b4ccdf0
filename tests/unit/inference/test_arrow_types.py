from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from rankwise.exceptions import ConfigError
from rankwise.inference import output as arrow_types
from rankwise.inference.output import ArrowTypes


def found(rows):
    types = ArrowTypes(Path("out.parquet"))
    for row in rows:
        types.add(row)
    return types.types()


@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_a_type_holds_all_values_whatever_comes_first(monkeypatch, at_once):
    monkeypatch.setattr(arrow_types, "_AT_ONCE", at_once)
    rows = [{"n": None, "s": {"a": 1}}, {"n": 1}, {"n": 2.5, "l": []}, {}, {"s": {"b": "x"}, "l": [{"c": None}]}]
    rows += [{"l": [{"c": "y"}], "t": "text"}]
    kinds = found(rows)
    assert kinds["n"] == pa.float64()
    assert kinds["t"] == pa.string()
    assert {field.name: field.type for field in kinds["s"]} == {"a": pa.int64(), "b": pa.string()}
    assert kinds["l"] == pa.list_(pa.struct([("c", pa.string())]))
    for name, kind in kinds.items():
        assert pa.array([row.get(name) for row in rows], type=kind).type == kind


@pytest.mark.parametrize("at_once", [1, 1000])
@pytest.mark.parametrize("pair", [(1, "x"), ([1], ["x"]), ({"a": 1}, [1]), (1, True), (1, 1 << 70)])
def test_values_that_no_type_holds_are_refused_by_their_column(monkeypatch, at_once, pair):
    monkeypatch.setattr(arrow_types, "_AT_ONCE", at_once)
    with pytest.raises(ConfigError, match=r"out.parquet: column 'mixed' has mixed types.*write \.jsonl"):
        found([{"mixed": value, "other": 1} for value in pair])
