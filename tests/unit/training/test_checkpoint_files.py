"""Directories are whole or not there."""

import errno
import os
from pathlib import Path

import pytest

from rankwise.exceptions import StorageError
from rankwise.modeling.fingerprint import check_manifest
from rankwise.training.checkpoint import remove, remove_temporary, replace_directory


def fill(directory, text="one"):
    (directory / "inner").mkdir()
    (directory / "inner" / "file.txt").write_text(text)


def test_a_finished_directory_has_a_manifest_over_its_files(tmp_path):
    with replace_directory(tmp_path / "a" / "result") as temporary:
        fill(temporary)
    check_manifest(tmp_path / "a" / "result")
    assert (tmp_path / "a" / "result" / "inner" / "file.txt").read_text() == "one"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["result"]


def test_an_error_leaves_nothing_behind_and_the_former_directory_in_place(tmp_path):
    with replace_directory(tmp_path / "result") as temporary:
        fill(temporary)
    with pytest.raises(FileNotFoundError), replace_directory(tmp_path / "result") as temporary:
        (temporary / "missing" / "file.txt").write_text("two")
    assert (tmp_path / "result" / "inner" / "file.txt").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_a_former_directory_is_replaced(tmp_path):
    for text in ("one", "two"):
        with replace_directory(tmp_path / "result") as temporary:
            fill(temporary, text)
    assert (tmp_path / "result" / "inner" / "file.txt").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    fsync, rename = os.fsync, Path.rename

    def noted(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(self, target):
        synced.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    with replace_directory(tmp_path / "result") as temporary:
        fill(temporary)
    at = len(synced) - 1 - synced[::-1].index("renamed")
    assert {temporary, temporary / "inner", temporary / "inner" / "file.txt"} <= set(synced[:at])
    assert synced[at + 1 :] == [tmp_path]


def test_a_full_disk_is_a_storage_error(tmp_path):
    with (
        pytest.raises(StorageError, match=r"writing result: cannot write .*free some space"),
        replace_directory(tmp_path / "result"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_processes_of_two_machines_with_one_number_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)
    with replace_directory(tmp_path / "result") as one, replace_directory(tmp_path / "result") as other:
        assert one != other
        assert one.is_dir()


def test_what_a_killed_process_left_is_swept(tmp_path):
    (tmp_path / ".tmp-step-1-99").mkdir()
    fill(tmp_path / ".tmp-step-1-99")
    (tmp_path / "step-1").mkdir()
    remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    remove(tmp_path / "step-1")
    assert not list(tmp_path.iterdir())
