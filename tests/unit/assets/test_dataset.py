import errno
import gzip
import json
import socket
from dataclasses import replace

import datasets
import pytest
from helpers.wheels import make_wheel

from rankwise.assets import dataset as module
from rankwise.assets.dataset import load_table, resolve_data
from rankwise.exceptions import AssetError, ConfigError, DatasetError, StorageError
from rankwise.settings import Settings

ROWS = [{"carat": 0.23, "cut": "Ideal"}, {"carat": 0.31, "cut": "Good"}, {"carat": 1.5, "cut": "Fair"}]
COMMIT = "abcdef0123" * 4


@pytest.fixture
def settings():
    return Settings.load()


def rows(source, settings, **options):
    return load_table(resolve_data(str(source), None, settings, **options), settings).to_list()


def delimited(mark):
    return "\n".join(mark.join(str(value) for value in line) for line in [ROWS[0], *(row.values() for row in ROWS)])


def write(path):
    """The rows in the format that the file's name asks for."""
    table = datasets.Dataset.from_list(ROWS)
    match path.suffixes:
        case [".jsonl"] | [".ndjson"]:
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case [".json"]:
            path.write_text(json.dumps(ROWS))
        case [".csv"]:
            path.write_text(delimited(","))
        case [".tsv"]:
            path.write_text(delimited("\t"))
        case [".parquet"]:
            table.to_parquet(path)
        case [".arrow"]:
            table.save_to_disk(path.parent / "saved")
            next((path.parent / "saved").glob("*.arrow")).rename(path)
        case [".jsonl", ".gz"]:
            path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    return path


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.ndjson", "x.json", "x.csv", "x.tsv", "x.parquet", "x.arrow", "x.jsonl.gz", "y.v2.JSONL"]
)
def test_a_file_is_read_by_what_its_name_says(tmp_path, settings, name):
    path = write(tmp_path / name.replace("y.v2.JSONL", "x.jsonl"))
    path = path.rename(tmp_path / name)
    assert rows(path, settings) == ROWS


def test_a_text_file_is_a_table_of_lines(tmp_path, settings):
    (tmp_path / "x.txt").write_text("one\ntwo\n")
    assert rows(tmp_path / "x.txt", settings) == [{"text": "one"}, {"text": "two"}]


def test_the_same_bytes_are_another_table_under_another_suffix(tmp_path, settings):
    write(tmp_path / "x.csv")
    (tmp_path / "x.txt").write_bytes((tmp_path / "x.csv").read_bytes())
    assert rows(tmp_path / "x.csv", settings) == ROWS
    assert rows(tmp_path / "x.txt", settings)[0] == {"text": "carat,cut"}


@pytest.mark.parametrize(("split", "count"), [("train", 3), ("test", 3), ("train[:2]", 2), ("train[50%:]", 1)])
def test_a_file_is_one_table_and_splits_may_cut_it(tmp_path, settings, split, count):
    assert len(rows(write(tmp_path / "x.jsonl"), settings, split=split)) == count


def test_a_table_is_read_once_for_a_content_wherever_it_lies(tmp_path, settings, monkeypatch):
    first = rows(write(tmp_path / "x.jsonl"), settings)
    (tmp_path / "x.jsonl").rename(tmp_path / "moved.jsonl")
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("read again"))
    assert rows(tmp_path / "moved.jsonl", settings) == first


def test_a_changed_file_is_another_table(tmp_path, settings):
    path = write(tmp_path / "x.jsonl")
    rows(path, settings)
    path.write_text(path.read_text().replace("Ideal", "Great"))
    assert rows(path, settings)[0]["cut"] == "Great"


def test_the_builders_own_cache_is_not_kept_beside_the_table(tmp_path, settings):
    rows(write(tmp_path / "x.jsonl"), settings)
    (entry,) = (settings.cache / "datasets").iterdir()
    assert [path.name for path in entry.iterdir()] == ["table"]


def test_a_directory_of_files_is_read_by_split(tmp_path, settings):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl")
    (folder / "test.jsonl").write_text('{"carat": 9.0, "cut": "Rare"}\n')
    assert rows(folder, settings) == ROWS
    assert rows(folder, settings, split="test") == [{"carat": 9.0, "cut": "Rare"}]


def test_saved_datasets_are_read_with_and_without_splits(tmp_path, settings):
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "valid": table.select([0])}).save_to_disk(tmp_path / "two")
    assert rows(tmp_path / "one", settings) == ROWS
    assert rows(tmp_path / "two", settings, split="valid") == ROWS[:1]
    with pytest.raises(DatasetError, match="has no split 'test'; it has train, valid"):
        rows(tmp_path / "two", settings, split="test")


def test_a_file_out_of_a_wheel_is_a_table(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    make_wheel(tmp_path, "rows", "1.0", {"rows/x.csv": delimited(",").encode()})
    found = resolve_data("pypi:rows==1.0#rows/x.csv", None, settings)
    assert found.source == "pypi:rows==1.0#rows/x.csv"
    assert load_table(found, settings).to_list() == ROWS
    assert resolve_data(found.source, found.revision, settings).pinned


def test_a_pin_is_checked_and_its_key_is_named(tmp_path, settings):
    path = write(tmp_path / "x.jsonl")
    found = resolve_data(str(path), None, settings)
    assert (found.source, found.pinned, found.hub) == (str(path), False, None)
    assert resolve_data(str(path), found.revision, settings).pinned
    with pytest.raises(AssetError, match=f"(?s)wrong digest.*`eval_revision: {found.revision}`"):
        resolve_data(str(path), f"sha256:{'0' * 64}", settings, key="eval_revision")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("./none.jsonl", AssetError, r"dataset: /.*/none\.jsonl does not exist; use a file"),
        ("pypi:x==1#x/model.pkl", ConfigError, r"must be a directory or a file of type \.jsonl, .*got 'x/model\.pkl'"),
        ("./x.xlsx", ConfigError, r"must be a directory or a file of type \.jsonl, .*got 'x\.xlsx'"),
        ("what is this", ConfigError, "^train: must be org/name"),
    ],
)
def test_what_is_no_data_is_refused(tmp_path, settings, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.xlsx").write_bytes(b"")
    with pytest.raises(error, match=message):
        resolve_data(source, None, settings)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": '), ("x.parquet", "not parquet"), ("x.csv", "a,b\n1,2\n1,2,3,4"),
        ("x.jsonl", ""), ("x.csv", ""),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_and_leaves_nothing(tmp_path, settings, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(AssetError, match=rf"cannot read .*/{name} at sha256:"):
        rows(tmp_path / name, settings)
    assert list((settings.cache / "datasets").iterdir()) == []


@pytest.mark.parametrize(("name", "content"), [("x.csv", "a,b\n"), ("x.json", "[]")])
def test_a_table_without_rows_is_named(tmp_path, settings, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=rf"/{name} at sha256:\w+ has no rows"):
        rows(tmp_path / name, settings)


def test_a_directory_without_data_is_named(tmp_path, settings):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "notes").write_text("nothing that is a table")
    with pytest.raises(AssetError, match=r"cannot read .*/rows at sha256:"):
        rows(tmp_path / "rows", settings)


def test_a_directory_with_a_loading_script_does_not_run_it(tmp_path, settings):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "rows.py").write_text("raise SystemExit('run')")
    with pytest.raises((AssetError, DatasetError)):
        rows(folder, settings)


def test_an_unknown_split_is_named(tmp_path, settings):
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl")
    with pytest.raises(DatasetError, match=r'(?s)split \'dev\'.*Unknown split "dev"'):
        rows(folder, settings, split="dev")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_the_table_is_explained_and_leaves_nothing(tmp_path, settings, monkeypatch, number):
    def fail(*_, **__):
        raise OSError(number, "refused")

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", fail)
    with pytest.raises(StorageError, match=r"reading .*x\.jsonl: cannot write"):
        rows(write(tmp_path / "x.jsonl"), settings)
    assert list((settings.cache / "datasets").iterdir()) == []


def test_nothing_is_printed_and_the_progress_bars_of_others_stay_as_they_were(tmp_path, settings, capfd):
    datasets.enable_progress_bars()
    rows(write(tmp_path / "x.jsonl"), settings)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """`org/rows` in Hugging Face's cache, without the hub's list of its files."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("used the network"))
    repo = tmp_path / "hub" / "datasets--org--rows"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    write(folder / "train.jsonl")
    return folder


def test_a_hub_data_set_in_the_cache_is_read_offline(snapshot, settings, caplog):
    settings = replace(settings, offline=True)
    found = resolve_data("org/rows", COMMIT, settings)
    assert (found.hub, found.path, found.pinned) == ("org/rows", None, True)
    assert load_table(found, settings).to_list() == ROWS
    assert f"the cache does not record whether all files of {COMMIT}" in caplog.text


def test_a_table_of_the_hub_that_was_read_needs_nothing_more(snapshot, settings):
    found = resolve_data("org/rows", COMMIT, settings)
    load_table(found, replace(settings, offline=True))
    (snapshot / "train.jsonl").unlink()
    assert load_table(found, replace(settings, offline=False)).to_list() == ROWS


def test_offline_a_data_set_that_is_not_in_the_cache_is_an_error_with_advice(snapshot, settings):
    settings = replace(settings, offline=True)
    with pytest.raises(AssetError, match=f"org/other at {COMMIT} is not complete in the cache .*HF_HUB_OFFLINE is set"):
        load_table(resolve_data("org/other", COMMIT, settings), settings)
