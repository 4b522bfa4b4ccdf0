import errno
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankwise.exceptions import AssetError, StorageError
from rankwise.files import ensure_entry, remove_entry, remove_leftovers, tree_size
from rankwise.settings import Settings

BUILDER = """
import sys, time
from pathlib import Path
from rankwise.files import ensure_entry
from rankwise.settings import Settings

def build(folder):
    print("building", flush=True)
    (folder / "half").write_text("half")
    time.sleep(float(sys.argv[1]))
    (folder / "whole").write_text("whole")

settings = Settings.load()
path = ensure_entry(settings.cache / "bases" / "x", settings, build, doing="test")
assert sorted(file.name for file in path.iterdir()) == ["half", "whole"]
"""


@pytest.fixture
def settings():
    return Settings.load()


@pytest.fixture
def path(settings):
    return settings.cache / "bases" / "x"


def build(folder):
    (folder / "file").write_text("content")


def states(settings):
    stats = {file: file.stat() for file in settings.cache.rglob("*")}
    return {file: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in stats.items()}


def no_traces(settings):
    """Nothing but locks, which are empty files."""
    return [file for file in settings.cache.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_an_entry_is_built_once(settings, path):
    built = []
    for _ in range(2):
        ensure_entry(path, settings, lambda folder: built.append(build(folder)), doing="test")
    assert len(built) == 1
    assert (path / "file").read_text() == "content"


def test_an_entry_that_is_there_is_not_touched(settings, path, monkeypatch):
    ensure_entry(path, settings, build, doing="test")
    before = states(settings)
    monkeypatch.setattr("filelock.FileLock", lambda *_: pytest.fail("took a lock"))
    ensure_entry(path, settings, build, doing="test")
    assert states(settings) == before


def test_an_entry_is_not_there_before_it_is_whole(settings, path):
    def check(folder):
        build(folder)
        assert not path.exists()

    ensure_entry(path, settings, check, doing="test")
    assert path.exists()


@pytest.mark.parametrize("error", [AssetError("wrong digest"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing(settings, path, error):
    def fail(folder):
        build(folder)
        raise error

    with pytest.raises(type(error)):
        ensure_entry(path, settings, fail, doing="test")
    assert no_traces(settings)
    assert not path.exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "No space left on device; free some space"), (errno.EROFS, "Read-only file system; make it")],
)
@pytest.mark.parametrize("call", ["mkdir", "write", "fsync", "rename"])
def test_a_full_disk_and_a_read_only_one_are_explained_and_leave_nothing(
    settings, path, monkeypatch, number, message, call
):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    owners = {"mkdir": Path, "fsync": os, "rename": Path}
    if call in owners:
        monkeypatch.setattr(owners[call], call, fail)
    with pytest.raises(StorageError, match=rf"unpacking: cannot write .*: {message}") as caught:
        ensure_entry(path, settings, fail if call == "write" else build, doing="unpacking")
    assert caught.value.exit_code == 3
    assert no_traces(settings)
    assert not path.exists()


def test_files_that_a_library_made_private_become_readable_as_the_umask_says(settings, path):
    def private(folder):
        build(folder)
        (folder / "file").chmod(0o600)

    (settings.cache).mkdir(parents=True)
    (settings.cache / "new").touch()
    ensure_entry(path, settings, private, doing="test")
    assert stat.S_IMODE((path / "file").stat().st_mode) == stat.S_IMODE((settings.cache / "new").stat().st_mode)


def test_two_processes_build_an_entry_once(settings):
    command = [sys.executable, "-c", BUILDER, "0.5"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(said) == ["", "building\n"]


def test_what_a_killed_process_left_is_cleared_by_the_next(settings, path):
    process = subprocess.Popen([sys.executable, "-c", BUILDER, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    deadline = time.monotonic() + 10
    while not list(path.parent.glob(".*/half")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    assert not path.exists()
    ensure_entry(path, settings, build, doing="test")
    assert [file.name for file in path.iterdir()] == ["file"]
    assert [file.name for file in path.parent.iterdir()] == ["x"]


def test_removing_an_entry_tells_its_size(settings, path):
    ensure_entry(path, settings, build, doing="test")
    assert tree_size(path) == len("content")
    assert remove_entry(path, settings) == len("content")
    assert not path.exists()
    assert no_traces(settings)


def test_leftovers_are_removed_but_not_those_of_a_process_that_lives(settings, path):
    process = subprocess.Popen([sys.executable, "-c", BUILDER, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    (path.parent / ".y.tmp").mkdir()
    (path.parent / ".y.tmp" / "half").write_text("half")
    assert remove_leftovers(path.parent, settings) == 4
    assert [left.name for left in path.parent.iterdir()] == [".x.tmp"]
    process.kill()
    process.communicate()
    remove_leftovers(path.parent, settings)
    assert list(path.parent.iterdir()) == []
