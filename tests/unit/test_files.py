import errno
import os
from pathlib import Path

import pytest

from rankwise.exceptions import StorageError
from rankwise.files import (
    complete_directory,
    format_size,
    remove_directory,
    replacing,
    storage_errors,
    write_atomically,
)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "make it writable"),
        (errno.EACCES, "make it writable"),
        (errno.ENOTDIR, "a file is where a directory must be"),
    ],
)
def test_what_a_person_can_mend_about_the_disk_is_said(number, advice):
    with (
        pytest.raises(StorageError, match=rf"^saving: cannot write /x/y: .*; {advice}") as caught,
        storage_errors(Path("/x"), "saving"),
    ):
        raise OSError(number, os.strerror(number), "/x/y")
    assert caught.value.exit_code == 3


def test_a_full_disk_comes_with_the_room_there_is_and_in_the_words_of_safetensors_too(tmp_path):
    class SafetensorError(Exception):
        pass

    message = (
        rf"^saving: cannot write {tmp_path}/new/file: No space left on device; free some space, .* "
        rf"\([0-9,]+ bytes of [0-9,]+ are free at {tmp_path}\)$"
    )
    with pytest.raises(StorageError, match=message), storage_errors(tmp_path / "new" / "file", "saving"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), storage_errors(tmp_path, "saving"):
        raise SafetensorError("Error while deserializing header: invalid header")


def test_other_errors_of_the_system_stay_what_they_are():
    with pytest.raises(FileNotFoundError), storage_errors(Path("/x"), "saving"):
        raise FileNotFoundError(errno.ENOENT, "gone", "/x/y")


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "file"
    write_atomically(target, b"first")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="free some space"):
        write_atomically(target, b"second")
    assert target.read_bytes() == b"first"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_two_writers_of_one_file_have_names_of_their_own_also_with_one_number(tmp_path):
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "one"


def test_a_directory_gets_its_name_when_it_is_complete(tmp_path):
    with complete_directory(tmp_path / ".new", lambda path: path.rename(tmp_path / "new")) as temporary:
        (temporary / "file").write_text("content")
        assert [path.name for path in tmp_path.iterdir()] == [".new"]
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["new", "new/file"]


def test_nothing_of_an_incomplete_directory_stays(tmp_path):
    def refuse(path):
        raise FileExistsError

    with pytest.raises(FileNotFoundError), complete_directory(tmp_path / ".new", refuse) as temporary:
        (temporary / "missing" / "file").write_text("content")
    with pytest.raises(FileExistsError), complete_directory(tmp_path / ".new", refuse) as temporary:
        (temporary / "file").write_text("content")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_removed_under_another_name(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("content")

    def full(path):
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", full)
        with pytest.raises(OSError, match="broken"):
            remove_directory(tmp_path / "old")
    assert not (tmp_path / "old").exists()
    (tmp_path / "old").mkdir()
    remove_directory(tmp_path / "old", tmp_path / "doomed")
    assert not (tmp_path / "doomed").exists()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (109_051_904, "109.05 MB"), (5_700_000_000, "5.70 GB"),
        (10**16, "10000.00 TB"),
    ],
)  # fmt: skip
def test_sizes_are_decimal(count, text):
    assert format_size(count) == text


def test_sizes_have_the_unit_and_the_digits_that_are_asked_for():
    assert format_size(1_843_200, ".3g") == "1.84 MB"
    assert format_size(16_432_000_000, ",.1f", unit="GB") == "16.4 GB"
    assert format_size(1_234_567_890, ",.0f", unit="MB") == "1,235 MB"
    assert format_size(3 << 29, unit="GiB") == "1.50 GiB"
    assert format_size(64 << 20, ".0f", unit="MiB") == "64 MiB"
