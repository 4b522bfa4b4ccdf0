import bz2
import gzip
import json
import lzma
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankwise.assets.dataset import resolve_data
from rankwise.data.training_table import TextTable, TypedTable, open_table
from rankwise.exceptions import AssetError, ConfigError, DatasetError
from rankwise.experiment.schema import DatasetSpec
from rankwise.settings import Settings

WORDS = "zip,kg,color\n01067,1,NA\n,12.5,None\n 7,true,\n"
CELLS = [
    {"zip": "01067", "kg": "1", "color": "NA"},
    {"zip": None, "kg": "12.5", "color": "None"},
    {"zip": " 7", "kg": "true", "color": None},
]


@pytest.fixture
def settings(monkeypatch, tmp_path):
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / "home"))
    return replace(Settings.load(), cache=tmp_path / "cache", data_roots=())


def read(path, settings, split="train", **options):
    table = open_table(
        DatasetSpec(train=str(path), **options), resolve_data(str(path), None, settings, split), settings
    )
    return table, rows_of(table)


def rows_of(table):
    return [
        dict(zip(batch, values, strict=True))
        for batch in table.iter(batch_size=2)
        for values in zip(*batch.values(), strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.csv", bytes),
        ("rows.csv.gz", gzip.compress),
        ("rows.csv.bz2", bz2.compress),
        ("rows.csv.xz", lzma.compress),
        ("rows.csv.zst", lambda content: pa.compress(content, codec="zstd", asbytes=True)),
    ],
)
def test_cells_are_what_is_written(tmp_path, settings, name, write):
    (tmp_path / name).write_bytes(write(WORDS.encode()))
    table, rows = read(tmp_path / name, settings)
    assert isinstance(table, TextTable)
    assert rows == CELLS
    assert list(table["zip"]) == ["01067", None, " 7"]
    assert rows_of(table.select([2, 0])) == [CELLS[2], CELLS[0]]
    assert rows_of(table.select([2, 0]).select([1])) == [CELLS[0]]


def test_json_is_what_pythons_json_reads_and_a_key_may_be_missing(tmp_path, settings):
    rows = [{"day": "2024-01-07", "kg": 0}, {"kg": 11.5, "tags": ["a", {"b": None}]}, {"day": None, "kg": 2**70}]
    for name, text in (
        ("rows.jsonl", "\n\n".join(map(json.dumps, rows))),
        ("rows.json", json.dumps(rows, indent=2)),
        ("lines.json", "\n".join(map(json.dumps, rows))),
    ):
        (tmp_path / name).write_text(text)
        table, found = read(tmp_path / name, settings)
        assert table.column_names == ["day", "kg", "tags"]
        assert found == [{"day": None, "tags": None, **row} for row in rows], name


def test_many_rows_are_read_in_batches(tmp_path, settings):
    rows = [{"n": number, "text": "x" * (number % 7)} for number in range(3000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table, found = read(tmp_path / "rows.jsonl", settings)
    assert found == rows
    assert [row["n"] for row in rows_of(table.select([2999, 0, 1024, 1023]))] == [2999, 0, 1024, 1023]
    assert len(read(tmp_path / "rows.jsonl", settings, "train[10%:20%]")[1]) == 300
    assert read(tmp_path / "rows.jsonl", settings, "train[:2]")[1] == rows[:2]


def test_the_same_bytes_are_another_table_with_another_delimiter_or_encoding(tmp_path, settings):
    (tmp_path / "rows.csv").write_bytes("a;b\né;1\n".encode("cp1252"))
    _, rows = read(tmp_path / "rows.csv", settings, delimiter=";", encoding="cp1252")
    assert rows == [{"a": "é", "b": "1"}]
    _, rows = read(tmp_path / "rows.csv", settings, delimiter=",", encoding="latin-1")
    assert rows == [{"a;b": "é;1"}]


def test_typed_files_keep_their_types_and_the_digits_of_32_bits(tmp_path, settings):
    pq.write_table(pa.table({"x": pa.array([0.1, None], pa.float32()), "y": [0.1, 1.0]}), tmp_path / "rows.parquet")
    table, rows = read(tmp_path / "rows.parquet", settings)
    assert isinstance(table, TypedTable)
    assert [str(row["x"]) for row in rows] == ["0.1", "None"]
    assert [str(value) for value in table["x"]] == ["0.1", "None"]
    assert rows_of(table.select([1])) == [{"x": None, "y": 1.0}]


def test_a_directory_of_text_files_is_read_as_text(tmp_path, settings):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.csv").write_text("zip\n01067\n")
    (tmp_path / "data" / "train-1.csv").write_text("zip\n02115\n")
    (tmp_path / "data" / "test.csv").write_text("zip\n03044\n")
    assert read(tmp_path / "data", settings)[1] == [{"zip": "01067"}, {"zip": "02115"}]
    assert read(tmp_path / "data", settings, "test")[1] == [{"zip": "03044"}]
    with pytest.raises(DatasetError, match="has no split 'dev'; it has train, test"):
        read(tmp_path / "data", settings, "dev")


def test_a_saved_directory_keeps_its_types(tmp_path, settings):
    datasets.Dataset.from_dict({"n": [1, 2]}).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved", settings)[1] == [{"n": 1}, {"n": 2}]


def test_with_rendering_1_a_library_guesses_the_types(tmp_path, settings):
    (tmp_path / "rows.csv").write_text("zip,color\n01067,None\n")
    assert read(tmp_path / "rows.csv", settings, rendering=1)[1] == [{"zip": 1067, "color": None}]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.csv", b"a,b\n1,2\n1\n3,4,5\n6,7\n", DatasetError,
         "2 rows cannot be read: line 3 has 1 cells, the header has 2 columns; line 4 has 3 cells"),
        ("a.csv", b'a,b\n1,"2\n', DatasetError, "1 row cannot be read: line 2 is not CSV: unexpected end of data"),
        ("a.csv", b"a,a\n1,2\n", ConfigError, "the header repeats column names: a"),
        ("a.csv", b"zip;kg\n1;2\n", ConfigError, "seem to be separated by ';'; set dataset.delimiter to ';'"),
        ("a.csv", b"a\ncaf\xe9\n", DatasetError, "byte 0xe9 at 5 (line 2) begins no character of it; set dataset."),
        ("a.csv", b"\xfe\xff\x00a", DatasetError, "the byte order mark of UTF-16; set dataset.encoding to utf-16"),
        ("a.csv", b"", DatasetError, "has no rows"),
        ("a.csv", b"a,b\n", DatasetError, "has no rows"),
        ("a.jsonl", b"\n", DatasetError, "has no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": ', DatasetError, "line 2 is not JSON: Expecting value: line 1 column 7 (char 6); "
         "the line ends within a value: is the file cut short?"),
        ("a.jsonl", b'{"a": 1}\n' + b"x\n" * 5, DatasetError, "5 rows cannot be read: line 2 is not JSON"),
        ("a.jsonl", b"x\n" * 5, DatasetError, "(and 2 more)"),
        ("a.json", b'[{"a": 1}, {"a": ', DatasetError, "is not JSON: row 1"),
        ("a.csv.gz", b"not gzip", AssetError, "cannot read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_says_which_line_and_what_to_set(tmp_path, settings, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as raised:
        read(tmp_path / name, settings)
    assert message in str(raised.value)
    assert not list((tmp_path / "cache" / "datasets").glob("*")), "nothing is left behind"
