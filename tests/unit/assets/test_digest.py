import hashlib
import os
import time

import pytest

from rankwise import digests as digest
from rankwise.digests import directory_digest, file_digest
from rankwise.exceptions import AssetError
from rankwise.settings import Settings


@pytest.fixture
def settings():
    return Settings.load()


def aged(path, content=b"weights"):
    """A file that was written long enough ago for its time stamps to say whether it changes."""
    path.write_bytes(content)
    time.sleep(0.06)
    return path


def expected(content):
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def count_reads(monkeypatch):
    reads = []
    read = digest._read
    monkeypatch.setattr(digest, "_read", lambda path, *rest: reads.append(path) or read(path, *rest))
    return reads


@pytest.mark.parametrize("size", [0, 1, 4 << 20, (4 << 20) + 1])
def test_a_digest_is_the_sha256_of_the_content(tmp_path, settings, size):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file", settings) == expected(content)


def test_a_content_is_read_once_until_it_changes(tmp_path, settings, monkeypatch):
    file = aged(tmp_path / "file")
    reads = count_reads(monkeypatch)
    assert file_digest(file, settings) == file_digest(file, settings) == expected(b"weights")
    assert len(reads) == 1
    aged(file, b"WEIGHTS")
    assert file_digest(file, settings) == expected(b"WEIGHTS")
    assert len(reads) == 2


def test_setting_the_modification_time_back_does_not_hide_a_change(tmp_path, settings):
    file = aged(tmp_path / "file")
    before = file.stat()
    file_digest(file, settings)
    aged(file, b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file_digest(file, settings) == expected(b"WEIGHTS")


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, settings, monkeypatch):
    # A second write within the file system's clock tick would not move its time stamps.
    monkeypatch.setattr(digest, "_CLOCK_TICK_NS", 10**12)
    (tmp_path / "file").write_bytes(b"weights")
    reads = count_reads(monkeypatch)
    file_digest(tmp_path / "file", settings)
    file_digest(tmp_path / "file", settings)
    assert len(reads) == 2


def test_verifying_reads_anew_whatever_is_remembered(tmp_path, settings, monkeypatch):
    file = aged(tmp_path / "file")
    file_digest(file, settings)
    reads = count_reads(monkeypatch)
    assert file_digest(file, settings, verify=True) == expected(b"weights")
    assert len(reads) == 1


def test_a_link_has_the_digest_of_what_it_points_to(tmp_path, settings, monkeypatch):
    file = aged(tmp_path / "blob")
    (tmp_path / "link").symlink_to(file)
    file_digest(file, settings)
    reads = count_reads(monkeypatch)
    assert file_digest(tmp_path / "link", settings) == expected(b"weights")
    assert not reads


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path, settings, monkeypatch):
    file = aged(tmp_path / "file")
    read = digest._read

    def meddle(path, *rest):
        found = read(path, *rest)
        path.write_bytes(b"other content")
        return found

    monkeypatch.setattr(digest, "_read", meddle)
    with pytest.raises(AssetError, match="changed while it was read; run again"):
        file_digest(file, settings)


def test_a_missing_file_is_named(tmp_path, settings):
    with pytest.raises(AssetError, match=r"cannot read .*/nowhere: No such file") as caught:
        file_digest(tmp_path / "nowhere", settings)
    assert caught.value.exit_code == 3


def test_a_directory_and_its_copy_elsewhere_agree(tmp_path, settings):
    for name in ("one", "two"):
        (tmp_path / name / "below").mkdir(parents=True)
        (tmp_path / name / "a").write_bytes(b"1")
        (tmp_path / name / "below" / "b").write_bytes(b"2")
    (tmp_path / "two" / ".cache").mkdir()
    (tmp_path / "two" / ".cache" / "x").write_bytes(b"hidden files do not count")
    assert directory_digest(tmp_path / "one", settings) == directory_digest(tmp_path / "two", settings)


def test_names_and_contents_of_a_directory_both_count(tmp_path, settings):
    found = set()
    for number, (name, content) in enumerate([("a", b"1"), ("b", b"1"), ("a", b"2")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(content)
        found.add(directory_digest(folder, settings))
    assert len(found) == 3


def test_only_the_chosen_files_of_a_directory_count(tmp_path, settings):
    (tmp_path / "a").write_bytes(b"1")
    before = directory_digest(tmp_path, settings, files=[tmp_path / "a"])
    (tmp_path / "README.md").write_bytes(b"2")
    assert directory_digest(tmp_path, settings, files=[tmp_path / "a"]) == before


def test_an_empty_directory_has_no_digest(tmp_path, settings):
    with pytest.raises(AssetError, match="contains no files"):
        directory_digest(tmp_path, settings)
