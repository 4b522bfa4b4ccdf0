from __future__ import annotations

import csv
import datetime
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankwise.data.tables import TableRow
from rankwise.exceptions import AssetError, ConfigError
from rankwise.inference import output as tables
from rankwise.inference.output import output_format, write_rows
from rankwise.inference.source import INPUT_TEXT, Source
from rankwise.reporter import SILENT
from rankwise.settings import Settings


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path_factory.mktemp("home")))


def read_rows(path, form=INPUT_TEXT):
    """All rows of a file, as they are read to be answered."""
    source = Source(path, Settings.load(), form)
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
        output_format(tmp_path / "rows.xlsx")
    with pytest.raises(AssetError, match=r"cannot read .*nowhere\.jsonl: No such file"):
        read_rows(tmp_path / "nowhere.jsonl")
    (tmp_path / "broken.parquet").write_text("PAR1")
    with pytest.raises(AssetError, match="cannot be read"):
        read_rows(tmp_path / "broken.parquet")
    (tmp_path / "latin.csv").write_bytes(b"a\n\xff\n")
    with pytest.raises(
        AssetError, match=r"is not utf-8 text: byte 0xff at 2 \(line 2\) begins no character of it; set --encoding"
    ):
        read_rows(tmp_path / "latin.csv")


def test_a_cell_that_a_spreadsheet_would_compute_stays_as_it_is(tmp_path):
    """A leading quote would protect one program and spoil the data of all others; the documentation says so."""
    cells = ["=1+1", "@SUM(A1)", "+1", "-1", "\t=1", '=HYPERLINK("http://x","y")']
    rows = [{"text": cell} for cell in cells]
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = tmp_path / f"out{suffix}"
        write_rows(path, rows, {"text": pa.string()})
        assert [row.columns["text"] for row in read_rows(path)] == cells


ROWS = [{"zip": "01067", "name": "Dürr, A."}, {"zip": "", "name": "NA"}, {"zip": " 7", "name": 'say "hi"'}]
LINES = ['{"zip": "01067", "kg": 1.50}', '{"zip": null, "kg": 1e3}', "", '{"zip": "NA", "kg": 12345678901234567890123}']
DECODED = [{"zip": "01067", "kg": 1.5}, {"zip": None, "kg": 1000.0}, {"zip": "NA", "kg": 12345678901234567890123}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize(
    ("suffix", "delimiter", "given"), [(".csv", ",", None), (".tsv", "\t", None), (".csv", ";", ";")]
)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_cells_are_what_is_written_in_every_encoding(tmp_path, encoding, suffix, delimiter, given, ending):
    path = tmp_path / f"rows{suffix}"
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["zip", "name"], delimiter=delimiter, lineterminator=ending)
        writer.writeheader()
        writer.writerows(ROWS)
    form = replace(INPUT_TEXT, delimiter=given, encoding="utf-8" if encoding == "utf-8-sig" else encoding)
    assert [dict(row.columns) for row in read_rows(path, form)] == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "list.json"])
def test_json_is_what_pythons_json_reads(tmp_path, name):
    path = tmp_path / name
    lines = [line for line in LINES if line]
    path.write_text(f" [{', '.join(lines)}\n]\n" if name == "list.json" else "\n".join(LINES))
    assert [row.columns for row in read_rows(path)] == DECODED


def test_plain_text_is_a_row_a_line(tmp_path):
    (tmp_path / "rows.txt").write_text("one\n\n two \n", encoding="utf-8")
    assert [row.columns for row in read_rows(tmp_path / "rows.txt")] == [{"text": "one"}, {"text": " two "}]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_keeps_its_types(tmp_path, kind):
    table = pa.table({"x": pa.array([0.1, None], pa.float32()), "day": [datetime.date(2024, 1, 7)] * 2})
    with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(
        str(tmp_path / "rows.arrow"), table.schema
    ) as writer:
        writer.write_table(table)
    first, second = read_rows(tmp_path / "rows.arrow")
    assert (str(first.columns["x"]), first.columns["day"]) == ("0.1", datetime.date(2024, 1, 7))
    assert second.columns["x"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"zip;kg\n1;2\n", "the header is one column, 'zip;kg', so the cells seem to be separated by ';'; set "
         "--delimiter to ';', or to ',' if this is one column"),
        ("a.tsv", b"zip,kg\n1,2\n", "seem to be separated by ','; set --delimiter to ',', or to '\\t' if this is"),
        ("a.csv", b"\xff\xfez\x00\n\x00", "starts with the byte order mark of UTF-16; set --encoding to utf-16"),
        ("a.jsonl", b'{"a": "caf\xe9"}\n', "is not utf-8 text: byte 0xe9 at 10 (line 1) begins no character of it; set "
         "--encoding, for instance to cp1252 or latin-1"),
        ("a.json", b'[{"a": 1}, {"a": 2', "is not JSON: row 1: Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1}, {"a": 2}', "is cut short: the list does not end after row 1"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "is not JSON: row 0 is followed by '{', not by a comma"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_what_to_set(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((AssetError, ConfigError)) as raised:
        read_rows(tmp_path / name)
    assert message in str(raised.value)


def test_a_line_that_is_cut_short_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "tw')
    _, second = read_rows(tmp_path / "a.jsonl")
    assert second.error.startswith("line 2 is not JSON: Unterminated string")
    assert second.error.endswith("; the line ends within a value: is the file cut short?")


def test_an_encoding_that_cannot_be_divided_into_lines_is_told(tmp_path):
    # ISO-2022-JP writes the same character after different shifts.
    (tmp_path / "a.txt").write_bytes(b"\x1b(B\x1b(Ba\n")
    with pytest.raises(AssetError, match=r"its lines cannot be told apart in iso2022_jp.*; convert it to UTF-8"):
        read_rows(tmp_path / "a.txt", replace(INPUT_TEXT, encoding="iso2022_jp"))
