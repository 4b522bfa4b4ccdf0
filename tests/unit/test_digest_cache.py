import logging
import os
import sqlite3
import subprocess
import sys

import pytest

from rankwise.digests import DigestCache, _signed
from rankwise.exceptions import AssetError

# Each process writes and reads its own files' rows, all in one memo.
WRITER = """
import sys
from pathlib import Path
from rankwise.digests import DigestCache
memo, folder, first = DigestCache(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3])
for number in range(first, first + 40):
    file = folder / str(number)
    file.write_text(str(number))
    memo.remember(file.stat(), f"{number:064x}")
    assert memo.recall(file.stat()) == f"{number:064x}"
"""


@pytest.fixture
def memo(tmp_path):
    return DigestCache(tmp_path / "memo" / "digests.sqlite3")


def stat(path, content=b"x"):
    path.write_bytes(content)
    return path.stat()


def test_asking_makes_no_file(memo, tmp_path):
    assert memo.recall(stat(tmp_path / "file")) is None
    assert not memo.path.parent.exists()


def test_a_state_is_remembered_and_another_state_is_not_taken_for_it(memo, tmp_path):
    first = stat(tmp_path / "file")
    memo.remember(first, "a" * 64)
    assert memo.recall(first) == "a" * 64
    assert memo.recall(stat(tmp_path / "file", b"longer")) is None
    assert memo.recall(stat(tmp_path / "other")) is None


def test_a_file_has_one_row_however_often_it_changes(memo, tmp_path):
    for number in range(3):
        memo.remember(stat(tmp_path / "file", b"x" * number), f"{number:064x}")
    with sqlite3.connect(memo.path) as connection:
        assert connection.execute("SELECT count(*) FROM digest").fetchone() == (1,)
    connection.close()


def test_processes_share_a_memo(memo, tmp_path):
    commands = [[sys.executable, "-c", WRITER, memo.path, tmp_path, str(first)] for first in (0, 40, 80)]
    processes = [subprocess.Popen([str(part) for part in command]) for command in commands]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    found = [memo.recall((tmp_path / str(number)).stat()) for number in range(120)]
    assert found == [f"{number:064x}" for number in range(120)]


def test_a_damaged_memo_says_what_to_do(memo, tmp_path):
    memo.path.parent.mkdir()
    memo.path.write_bytes(b"not a database, " * 100)
    with pytest.raises(AssetError, match=r"is damaged .* delete it, and it is rebuilt"):
        memo.recall(stat(tmp_path / "file"))


def test_a_memo_that_cannot_be_written_costs_a_warning_only(memo, tmp_path, caplog):
    memo.path.parent.write_bytes(b"a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        memo.remember(stat(tmp_path / "file"), "a" * 64)
    assert "could not be written" in caplog.text


def test_inodes_of_64_bits_fit():
    assert _signed(2**64 - 1) == -1
    assert _signed(os.stat(__file__).st_ino) == os.stat(__file__).st_ino


def test_a_memo_that_another_thread_is_making_is_not_read_and_not_complained_of(memo, tmp_path, caplog):
    """SQLite makes the file first and the table later."""
    memo.path.parent.mkdir()
    memo.path.touch()
    first = stat(tmp_path / "file")
    assert memo.recall(first) is None
    assert caplog.text == ""
    memo.remember(first, "a" * 64)
    assert memo.recall(first) == "a" * 64
