from __future__ import annotations

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankwise.exceptions import AssetError, ConfigError
from rankwise.inference import tables
from rankwise.inference.source import Source
from rankwise.inference.tables import TableRow, table_format, write_rows
from rankwise.reporter import SILENT
from rankwise.settings import Settings


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path_factory.mktemp("home")))


def read_rows(path):
    """All rows of a file, as they are read to be answered."""
    source = Source(path, Settings.load())
    survey = source.survey(path.with_name("out.jsonl"), "model", 2, SILENT)
    rows = list(source.rows())
    assert len(rows) == survey.rows
    return rows


def test_a_line_that_is_no_row_does_not_stop_the_reading(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\nnot json\n[1]\n{"a": 2}\n')
    rows = read_rows(path)
    assert [row.index for row in rows] == [0, 1, 2, 3]
    assert rows[0] == TableRow(index=0, columns={"a": 1})
    assert rows[1].error.startswith("line 3 is not JSON: ")
    assert rows[2].error == "line 4 must be a JSON object, got list"
    assert rows[3].columns == {"a": 2}


def test_cells_of_csv_are_texts_and_a_line_with_other_cells_is_told(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,"two\nlines"\n1\n3,4\n', encoding="utf-8-sig")
    rows = read_rows(path)
    assert rows[0].columns == {"a": "1", "b": "two\nlines"}
    assert rows[1].error == "line 4 has 1 cells, the header has 2 columns"
    assert rows[2] == TableRow(index=2, columns={"a": "3", "b": "4"})


def test_an_empty_csv_has_no_rows_and_a_column_named_twice_is_refused(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    assert read_rows(tmp_path / "empty.csv") == []
    (tmp_path / "twice.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ConfigError, match="repeats column names: a; rename one of each"):
        read_rows(tmp_path / "twice.csv")


def test_parquet_keeps_its_types(tmp_path):
    when = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    pq.write_table(pa.table({"n": [1, 2], "when": [when, None]}), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
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
    columns = {"a": pa.int64(), "b": pa.struct([("c", pa.string())])}
    rows = [{"a": 1}, {"a": 2, "b": {"c": "ä"}}]
    write_rows(tmp_path / "out.jsonl", rows, columns)
    assert (tmp_path / "out.jsonl").read_text() == '{"a": 1}\n{"a": 2, "b": {"c": "ä"}}\n'
    write_rows(tmp_path / "out.csv", rows, columns)
    assert (tmp_path / "out.csv").read_text() == 'a,b\n1,\n2,"{""c"": ""ä""}"\n'
    write_rows(tmp_path / "out.parquet", rows, columns)
    assert pq.read_table(tmp_path / "out.parquet").to_pylist() == [{"a": 1, "b": None}, {"a": 2, "b": {"c": "ä"}}]


def test_bytes_are_refused_where_they_cannot_be_and_nothing_is_left(tmp_path):
    with pytest.raises(ConfigError, match=r"column 'image' holds bytes, which \.jsonl cannot store; write \.parquet"):
        write_rows(tmp_path / "out.jsonl", [{"image": b"x"}], {"image": None})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["x", 1 << 70])
def test_a_value_without_its_column_s_type_is_named_and_nothing_is_left(tmp_path, value):
    with pytest.raises(ConfigError, match=r"column 'a' has mixed types.*write \.jsonl"):
        write_rows(tmp_path / "out.parquet", [{"a": 1}, {"a": value}], {"a": pa.int64()})
    assert list(tmp_path.iterdir()) == []


def test_parquet_is_written_in_groups_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS_OF_A_GROUP", 3)
    write_rows(tmp_path / "out.parquet", ({"a": n} for n in range(7)), {"a": pa.int64()})
    assert pq.read_table(tmp_path / "out.parquet")["a"].to_pylist() == list(range(7))
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 3
    write_rows(tmp_path / "none.parquet", [], {"a": pa.int64()})
    assert pq.read_table(tmp_path / "none.parquet").schema == pa.schema([("a", pa.int64())])


def test_a_byte_order_mark_belongs_to_no_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8-sig")
    assert [row.columns for row in read_rows(tmp_path / "rows.jsonl")] == [{"a": 1}, {"a": 2}]


def test_lines_that_would_end_the_work_on_all_others_are_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep, far, near = ("[" * depth + "]" * depth for depth in (100_000, 100, 99))
    lines = [f'{{"a": {deep}}}', f'{{"a": {far}}}', '{"a": "half \\ud83d"}', '{"\\uDe00": 1}']
    lines += ['{"a": "whole \\ud83d\\ude00"}', json.dumps({"a": "[{" * 200 + '"' + "[" * 200}), f'{{"a": {near}}}']
    path.write_text("".join(f"{line}\n" for line in lines))
    rows = read_rows(path)
    assert [row.error is None for row in rows] == [False, False, False, False, True, True, True]
    assert rows[1].error == "line 2 is nested more than 100 deep"
    assert "line 3 has an unpaired surrogate" in rows[2].error
    assert rows[4].columns["a"].endswith("\U0001f600")
    write_rows(tmp_path / "out.jsonl", [row.columns for row in rows], {"a": None})


def test_a_quote_that_is_not_closed_takes_no_row_unseen(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,2\n"3"x,4\n5,"six\n7,8\n9,10\n')
    rows = read_rows(path)
    assert rows[0].columns == {"a": "1", "b": "2"}
    assert rows[1].error.startswith("line 3 is not CSV: ")
    assert rows[2].error.startswith("lines 4 to 6 are not CSV: unexpected end of data; check for a quote")
    assert len(rows) == 3


def test_parquet_columns_of_one_name_and_times_that_python_does_not_have_are_refused(tmp_path):
    cells = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([cells, cells], names=["prompt", "prompt"]), tmp_path / "twice.parquet")
    with pytest.raises(ConfigError, match="repeats column names: prompt; rename one of each"):
        read_rows(tmp_path / "twice.parquet")
    for kind in (pa.timestamp("ms"), pa.date32()):
        far = pa.array([10**17 if kind == pa.timestamp("ms") else 10**8], type=kind)
        pq.write_table(pa.table({"when": far}), tmp_path / "far.parquet")
        with pytest.raises(AssetError, match="rows 0 to 0 hold a value that Python cannot represent"):
            read_rows(tmp_path / "far.parquet")


def test_formats_that_are_not_known_and_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.jsonl, \.csv, \.parquet; got '\.xlsx'"):
        table_format(tmp_path / "rows.xlsx")
    with pytest.raises(AssetError, match=r"cannot read .*nowhere\.jsonl: No such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "broken.parquet").write_text("PAR1")
    with pytest.raises(AssetError, match="cannot be read"):
        read_rows(tmp_path / "broken.parquet")
    (tmp_path / "latin.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(AssetError, match="cannot be read: it is not UTF-8 text"):
        read_rows(tmp_path / "latin.csv")


def test_a_cell_that_a_spreadsheet_would_compute_stays_as_it_is(tmp_path):
    """A leading quote would protect one program and spoil the data of all others; the documentation says so."""
    cells = ["=1+1", "@SUM(A1)", "+1", "-1", "\t=1", '=HYPERLINK("http://x","y")']
    rows = [{"text": cell} for cell in cells]
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / f"out{suffix}"
        write_rows(path, rows, {"text": pa.string()})
        assert [row.columns["text"] for row in read_rows(path)] == cells
