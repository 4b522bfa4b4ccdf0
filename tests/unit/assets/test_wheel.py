import hashlib
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
from helpers.wheels import make_wheel

from rankwise.assets.wheel import _extract, fetch_member, member_entry
from rankwise.exceptions import AssetError, StorageError
from rankwise.experiment.source import PypiSource, parse_source
from rankwise.reporter import SILENT
from rankwise.settings import Settings

CONTENT = b"carat,price\n0.23,326\n"
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
OTHER = f"sha256:{'0' * 64}"
SOURCE = PypiSource("tiny-rows", "1.0", "tiny_rows/data/rows.csv")


@pytest.fixture
def settings():
    return Settings.load()


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A directory of wheels is all that pip knows."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    make_wheel(tmp_path / "wheels", "tiny-rows", "1.0", {SOURCE.member: CONTENT, "tiny_rows/__init__.py": b"1/0"})
    return tmp_path / "wheels"


def states(settings):
    """What a write would change. The cache of digests may learn of a file that was too young at the first look."""
    stats = {file: file.stat() for file in settings.cache.glob("pypi/**/*")}
    return {file: (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file, stat in stats.items()}


def fetch(settings, expected=DIGEST, source=SOURCE):
    return fetch_member(source, settings, expected=expected, key="train_revision")


def test_a_member_is_fetched_by_pip_as_pip_is_configured(wheels, settings):
    path, digest = fetch(settings)
    assert path.read_bytes() == CONTENT
    assert path.name == "rows.csv"
    assert digest == DIGEST
    assert not list(settings.cache.rglob("*.whl"))


def test_what_is_in_the_cache_needs_neither_pip_nor_network(wheels, settings, monkeypatch):
    first = fetch(settings)
    before = states(settings)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started a process"))
    assert fetch(settings) == fetch(settings, expected=None) == first
    assert states(settings) == before


def test_spellings_of_a_distribution_share_an_entry(settings):
    spelled = PypiSource("Tiny_Rows", "1.0", SOURCE.member)
    assert member_entry(spelled, settings) == member_entry(SOURCE, settings)


def test_what_does_not_fit_the_pin_is_not_kept(wheels, settings):
    with pytest.raises(AssetError, match=f"(?s)wrong digest of {SOURCE}.*{OTHER}.*{DIGEST}"):
        fetch(settings, expected=OTHER)
    assert not member_entry(SOURCE, settings).exists()
    assert fetch(settings)[1] == DIGEST


def test_a_cached_file_is_compared_with_the_pin(wheels, settings):
    fetch(settings)
    with pytest.raises(AssetError, match=f"(?s){OTHER}.*{DIGEST}.*train_revision: {DIGEST}"):
        fetch(settings, expected=OTHER)


@pytest.mark.parametrize("expected", [DIGEST, None])
def test_a_damaged_file_in_the_cache_is_told_from_a_wrong_pin(wheels, settings, expected):
    path, _ = fetch(settings)
    path.write_bytes(CONTENT.replace(b"326", b"327"))
    with pytest.raises(
        AssetError, match=rf"is damaged: it was {DIGEST} when it was fetched .*; remove .* and run again"
    ):
        fetch(settings, expected=expected)


def test_a_missing_member_names_the_nearest(wheels, settings):
    with pytest.raises(
        AssetError, match=r"has no member 'tiny_rows/rows.csv'; the most similar: tiny_rows/data/rows.csv"
    ):
        fetch(settings, source=PypiSource("tiny-rows", "1.0", "tiny_rows/rows.csv"))


def test_a_missing_version_gives_the_words_of_pip(wheels, settings):
    with pytest.raises(AssetError, match=r"cannot fetch tiny-rows==2.0 with pip: ERROR: .*tiny-rows==2.0") as caught:
        fetch(settings, source=PypiSource("tiny-rows", "2.0", SOURCE.member))
    assert caught.value.exit_code == 3
    assert "the package index does not answer" not in str(caught.value)


def test_an_index_that_does_not_answer_is_told_with_advice(wheels, settings, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(
        AssetError, match=r"the package index does not answer: check the network, or .*PIP_INDEX_URL"
    ) as caught:
        fetch(settings)
    assert "secret" not in str(caught.value)


def test_a_distribution_that_no_index_has_is_told_with_advice(wheels, settings):
    with pytest.raises(AssetError, match=r"no configured index has a wheel of it"):
        fetch(settings, source=PypiSource("never-made", "1.0", "x.csv"))


def test_a_python_without_pip_is_told_with_advice(wheels, settings, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    said = subprocess.CompletedProcess([], 1, "/usr/bin/python3: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    with pytest.raises(AssetError, match=r"has no pip: run `/usr/bin/python3 -m ensurepip`"):
        fetch(settings)


def test_a_broken_wheel_is_named(wheels, settings):
    wheel = next(wheels.iterdir())
    content = wheel.read_bytes()
    wheel.write_bytes(content.replace(CONTENT, CONTENT.replace(b"326", b"327")))
    with pytest.raises(AssetError, match=r"tiny_rows-1.0-py3-none-any.whl is not a valid wheel: Bad CRC"):
        fetch(settings)
    assert not member_entry(SOURCE, settings).exists()


def test_a_disk_that_is_full_while_unpacking_leaves_nothing(wheels, settings, monkeypatch):
    import errno

    import rankwise.assets.wheel as module

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_extract", full)
    with pytest.raises(StorageError, match=r"fetching pypi:tiny-rows.*No space left on device; free some space"):
        fetch(settings)
    assert not member_entry(SOURCE, settings).exists()
    assert not [file for file in settings.cache.rglob("*") if file.is_file() and file.suffix != ".lock"]


def _bomb(folder, name="tiny_rows/data/rows.csv", size=200 << 20, mode=0):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "bomb.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo(name)
        entry.compress_type = zipfile.ZIP_DEFLATED
        entry.external_attr = mode << 16
        with archive.open(entry, "w") as file:
            for _ in range(size >> 20):
                file.write(bytes(1 << 20))
    return path


def test_a_member_that_grows_beyond_all_measure_is_refused_before_it_is_unpacked(tmp_path):
    target = tmp_path / "rows.csv"
    with pytest.raises(AssetError, match=r"would expand from [\d,]+ to 209,715,200 bytes.* refused as a zip bomb"):
        _extract(_bomb(tmp_path), SOURCE.member, target, SILENT)
    assert not target.exists()


def test_a_member_larger_than_the_disk_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    wheel = _bomb(tmp_path, size=2 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(AssetError, match="1,000 are free in the cache"):
        _extract(wheel, SOURCE.member, tmp_path / "rows.csv", SILENT)


def test_a_link_in_a_wheel_is_no_file(tmp_path):
    with pytest.raises(AssetError, match="is a directory or a link"):
        _extract(_bomb(tmp_path, size=0, mode=0o120777), SOURCE.member, tmp_path / "rows.csv", SILENT)


@pytest.mark.parametrize("member", ["../rows.csv", "a/../../rows.csv", "/etc/passwd", "a/.."])
def test_a_member_cannot_leave_the_cache(member):
    with pytest.raises(ValueError, match="relative path without"):
        parse_source(f"pypi:tiny-rows==1.0#{member}")
