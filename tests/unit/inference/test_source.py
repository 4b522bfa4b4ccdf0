"""An input is read once, and then only where a part of it lies."""

from __future__ import annotations

import csv
import hashlib
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankwise.exceptions import AssetError
from rankwise.inference import source as module
from rankwise.inference.source import InputChangedError, InputIndex, Source
from rankwise.reporter import SILENT
from rankwise.settings import Settings


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path_factory.mktemp("home")))


def surveyed(path, shard_rows=3, *, output="out.jsonl", hold=False):
    source = Source(path, Settings.load(), hold=hold)
    survey = source.survey(path.with_name(output), "model", shard_rows, SILENT)
    return source, survey


def opened(path, index):
    """As another process opens it: with the index from its file."""
    source = Source(path, Settings.load())
    source.use(InputIndex.of(json.loads(json.dumps(index.to_json()))))
    return source


PIECES = ["a", "ä€\U0001f600", ",", '"', '""', "\n", "\r", "\r\n", " ", "\u2028", "\x85", "1", "x" * 9000]


def jsonl(draw):
    """Lines that are rows, blank, or no rows, with every ending that Python takes for one."""
    lines = []
    for number in range(draw.randint(0, 30)):
        text = "".join(draw.choices(PIECES, k=3))
        lines.append(draw.choice([json.dumps({"n": number, "t": text}, ensure_ascii=False), "", "  ", '{"a": ', "[1]"]))
    ending = draw.choice(["\n", "\r\n", "\r"])
    text = "".join(line + draw.choice([ending, ending, "\n"]) for line in lines)
    return text if draw.random() < 0.7 else text.rstrip("\r\n")


def table(draw):
    """Cells with quotes, commas and ends of lines; rows of too many cells; quotes that are not closed."""
    ending = draw.choice(["\n", "\r\n", "\r"])

    def cell(text):
        return '"' + text.replace('"', '""') + '"' if set(text) & set('",\r\n') else text

    rows = [["a", draw.choice(["b", "b\nb", "b,b"])]]
    rows += [["".join(draw.choices(PIECES, k=3)) for _ in range(draw.choice([2, 2, 2, 3]))] for _ in range(12)]
    lines = [",".join(map(cell, row)) for row in rows]
    for _ in range(2):
        lines.insert(draw.randint(1, len(lines)), draw.choice(["", '"x"y,1', "1,2"]))
    return ending.join(lines) + draw.choice(["", ending, ending * 3, f'{ending}"open,1{ending}2,3'])


def expected_rows(path):
    """The rows as Python's own reading of the whole file gives them: cells, or None where there is an error."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error:
                    yield None
                    continue
                if cells:
                    yield dict(zip(header, cells, strict=True)) if len(cells) == len(header) else None
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                yield value if isinstance(value, dict) else None


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_rows_are_those_of_the_whole_file_from_wherever_they_are_read(tmp_path, seed, hold):
    draw = random.Random(seed)
    path = tmp_path / ("rows.csv" if seed % 2 else "rows.jsonl")
    text = table(draw) if seed % 2 else jsonl(draw)
    path.write_bytes(("\ufeff" * draw.randint(0, 1) + text).encode())
    source, survey = surveyed(path, draw.randint(1, 5), hold=hold)
    rows = list(source.rows())
    assert [row.columns if row.error is None else None for row in rows] == list(expected_rows(path))
    assert [row.index for row in rows] == list(range(survey.rows))
    assert source.index.input == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    later, size = opened(path, source.index), source.index.shard_rows
    for first in range(survey.rows):
        assert list(later.rows(first)) == rows[first:]
    wanted = [shard for shard in range(-(-survey.rows // size)) if draw.random() < 0.6]
    found = list(later.shards(wanted, survey.rows))
    assert [shard for shard, _ in found] == wanted
    assert [some for _, some in found] == [rows[shard * size : (shard + 1) * size] for shard in wanted]


@pytest.mark.parametrize("text", ["a,b\r\n1,2\r\n", '"a\nc",b\n1,2\n', "a,b\r1,2\r"])
def test_errors_name_the_line_of_the_file_in_every_shard(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_bytes((text + '\n3,"4\n5"\n6\n').encode())
    source, survey = surveyed(path, 1)
    ((_, (row,)),) = opened(path, source.index).shards([survey.rows - 1], survey.rows)
    lines = len(path.read_bytes().splitlines())
    assert row.error == f"line {lines} has 1 cells, the header has 2 columns"


def parquet(path, rows, **options):
    pq.write_table(pa.table({"n": list(range(rows)), "t": [f"text {n}" for n in range(rows)]}), path, **options)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("group", [1, 4, 7, 100])
def test_parquet_is_read_by_row_groups(tmp_path, group, hold):
    path = tmp_path / "rows.parquet"
    parquet(path, 25, row_group_size=group)
    source, survey = surveyed(path, 3, hold=hold)
    assert len(source.index.blocks) == -(-25 // group)
    assert source.index.input == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    later = opened(path, source.index)
    for shard, rows in later.shards([1, 2, 5, 8], survey.rows):
        assert [row.index for row in rows] == [row.columns["n"] for row in rows]
        assert [row.index for row in rows] == list(range(shard * 3, min(25, shard * 3 + 3)))
    assert [row.columns["n"] for row in later.rows()] == list(range(25))


def bytes_read():
    """What this process has read so far, by any library."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_part_reads_its_own_bytes_only(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    rows, size = 2000, 100
    draw = random.Random(0)
    texts = [draw.randbytes(2000).hex() for _ in range(rows)]
    if suffix == ".parquet":
        pq.write_table(pa.table({"t": texts}), path, row_group_size=size, compression="none", use_dictionary=False)
    else:
        lines = [json.dumps({"t": text}) if suffix == ".jsonl" else f'"{text}\n"' for text in texts]
        path.write_text(("t\n" if suffix == ".csv" else "") + "".join(line + "\n" for line in lines))
    source, survey = surveyed(path, size)
    whole = path.stat().st_size
    assert whole > 4_000_000
    for shard in (0, 10, 19):
        before = bytes_read()
        ((_, found),) = opened(path, source.index).shards([shard], survey.rows)
        read = bytes_read() - before
        assert [row.columns["t"].strip() for row in found] == texts[shard * size : (shard + 1) * size]
        # A row group is hashed, then decoded; the footer is read twice.
        assert read < whole * (4 if suffix == ".parquet" else 1.5) / 20


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_block_that_has_changed_is_refused_and_others_are_not_looked_at(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet(path, 9, row_group_size=3, compression="none", use_dictionary=False)
    else:
        head = "n,t\n" if suffix == ".csv" else ""
        row = "{0},text {0}\n" if suffix == ".csv" else '{{"n": {0}, "t": "text {0}"}}\n'
        path.write_text(head + "".join(row.format(n) for n in range(9)))
    source, survey = surveyed(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"text 1", b"text 9"))
    later = opened(path, source.index)
    for shard in (1, 2):
        ((_, rows),) = later.shards([shard], survey.rows)
        assert [row.columns["t"] for row in rows] == [f"text {n}" for n in range(shard * 3, shard * 3 + 3)]
    for read in (lambda: list(later.shards([0], survey.rows)), lambda: list(later.rows())):
        with pytest.raises(InputChangedError, match="changed during the prediction") as caught:
            read()
        assert caught.value.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a,b\n1,2\n", "a,c\n1,2\n"),
        ("a,b\n1,2\n\n", "a,b\n1,2\n3"),
        ("a,b\n1,2\n", "a,b\n1,2\n3,4\n"),
    ],
    ids=["header", "what lies behind the rows", "size"],
)
def test_what_lies_in_no_block_is_checked_at_once(tmp_path, before, after):
    path = tmp_path / "rows.csv"
    path.write_text(before)
    source, _ = surveyed(path, 1)
    path.write_text(after)
    with pytest.raises(InputChangedError):
        opened(path, source.index)


def test_an_index_that_does_not_fit_its_own_input_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    source, _ = surveyed(path, 1)
    values = source.index.to_json()
    values["blocks"] = [[0, 0, 0, 10, "0" * 64], *values["blocks"][1:]]
    damaged = Source(path, Settings.load())
    damaged.use(InputIndex.of(json.loads(json.dumps(values))))
    with pytest.raises(AssetError, match=r"the index of .*rows\.jsonl is damaged; start over with --restart"):
        list(damaged.rows())
    assert InputIndex.of({**values, "format_version": 99}) is None


def test_what_is_held_stays_as_it_was(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    source, _ = surveyed(path, hold=True)
    path.write_text('{"a": 2}\n')
    assert [row.columns for row in source.rows()] == [{"a": 1}]
    with pytest.raises(InputChangedError):
        source.check_unchanged()
    # Another file's content is never remembered under this one's digest.
    assert Source(path, Settings.load()).digest(SILENT) == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_large_input_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HELD_BYTES", 5)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n')
    source, _ = surveyed(path, hold=True)
    path.write_text('{"a": 2}\n')
    with pytest.raises(InputChangedError):
        list(source.rows())


def test_types_that_were_inferred_for_parquet_are_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"n": 1, "s": {"a": null}}\n{"n": 2.5, "s": {"b": ["x"]}}\n')
    source, _ = surveyed(path, output="out.parquet")
    types = opened(path, source.index).types()
    assert types["n"] == pa.float64()
    assert types["s"] == pa.struct([("a", pa.null()), ("b", pa.list_(pa.string()))])
