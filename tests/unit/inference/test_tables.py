from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankwise.exceptions import AssetError, ConfigError
from rankwise.inference.tables import Row, read_rows, table_format, write_rows


def test_a_line_that_is_no_row_does_not_stop_the_reading(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\nnot json\n[1]\n{"a": 2}\n')
    rows = list(read_rows(path))
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert rows[0] == Row(index=0, columns={"a": 1})
    assert rows[1].error.startswith("line 3 is not JSON: ")
    assert rows[2].error == "line 4 must be a JSON object, got list"
    assert rows[3].columns == {"a": 2}


def test_cells_of_csv_are_texts_and_a_line_with_other_cells_is_told(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,"two\nlines"\n1\n3,4\n', encoding="utf-8-sig")
    rows = list(read_rows(path))
    assert rows[0].columns == {"a": "1", "b": "two\nlines"}
    assert rows[1].error == "line 4 has 1 cells, the header has 2 columns"
    assert rows[2] == Row(index=2, columns={"a": "3", "b": "4"})


def test_an_empty_csv_has_no_rows_and_a_column_named_twice_is_refused(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    assert list(read_rows(tmp_path / "empty.csv")) == []
    (tmp_path / "twice.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ConfigError, match="names a column twice: a; rename one of them"):
        list(read_rows(tmp_path / "twice.csv"))


def test_parquet_keeps_its_types(tmp_path):
    when = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    pq.write_table(pa.table({"n": [1, 2], "when": [when, None]}), tmp_path / "rows.parquet")
    rows = list(read_rows(tmp_path / "rows.parquet"))
    assert rows[0].columns == {"n": 1, "when": when}
    types = {"n": pa.int64(), "when": pa.timestamp("us", tz="UTC")}
    write_rows(tmp_path / "copy.parquet", [row.columns for row in rows], types)
    assert pq.read_table(tmp_path / "copy.parquet").equals(pq.read_table(tmp_path / "rows.parquet"))


def test_what_json_does_not_have_becomes_a_text_or_null(tmp_path):
    when = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    row = {"when": when, "x": float("nan"), "deep": [{"y": (1, 2)}]}
    write_rows(tmp_path / "out.jsonl", [row], dict.fromkeys(row))
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {
        "when": "2026-01-02T03:04:00+00:00", "x": None, "deep": [{"y": [1, 2]}]
    }  # fmt: skip


def test_a_column_that_a_row_lacks(tmp_path):
    columns = {"a": pa.int64(), "b": None}
    rows = [{"a": 1}, {"a": 2, "b": {"c": "ä"}}]
    write_rows(tmp_path / "out.jsonl", rows, columns)
    assert (tmp_path / "out.jsonl").read_text() == '{"a": 1}\n{"a": 2, "b": {"c": "ä"}}\n'
    write_rows(tmp_path / "out.csv", rows, columns)
    assert (tmp_path / "out.csv").read_text() == 'a,b\n1,\n2,"{""c"": ""ä""}"\n'
    write_rows(tmp_path / "out.parquet", rows, columns)
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": {"c": "ä"}}]


def test_bytes_are_refused_where_they_cannot_be_and_nothing_is_left(tmp_path):
    with pytest.raises(ConfigError, match=r"column 'image' holds bytes, which \.jsonl cannot hold; write \.parquet"):
        write_rows(tmp_path / "out.jsonl", [{"image": b"x"}], {"image": None})
    assert list(tmp_path.iterdir()) == []


def test_a_parquet_column_of_two_types_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"the column 'a' does not have one type.*write \.jsonl"):
        write_rows(tmp_path / "out.parquet", [{"a": 1}, {"a": "x"}], {"a": None})
    assert list(tmp_path.iterdir()) == []


def test_formats_that_are_not_known_and_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"ends in \.jsonl, \.csv, \.parquet, got '\.xlsx'"):
        table_format(tmp_path / "rows.xlsx")
    with pytest.raises(AssetError, match="there is no"):
        list(read_rows(tmp_path / "nowhere.jsonl"))
    (tmp_path / "broken.parquet").write_text("PAR1")
    with pytest.raises(AssetError, match="cannot be read"):
        list(read_rows(tmp_path / "broken.parquet"))
    (tmp_path / "latin.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(AssetError, match="cannot be read"):
        list(read_rows(tmp_path / "latin.csv"))


def test_a_cell_that_a_spreadsheet_would_compute_stays_as_it_is(tmp_path):
    """A leading quote would protect one program and spoil the data of all others; the documentation says so."""
    cells = ["=1+1", "@SUM(A1)", "+1", "-1", "\t=1", '=HYPERLINK("http://x","y")']
    rows = [{"text": cell} for cell in cells]
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / f"out{suffix}"
        write_rows(path, rows, {"text": pa.string()})
        assert [row.columns["text"] for row in read_rows(path)] == cells
