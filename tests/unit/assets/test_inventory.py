import json
import shutil

import pytest
from helpers.gguf_file import make_gguf
from helpers.tiny import make_base
from helpers.wheels import make_wheel

from rankwise.assets.base import local_bases, resolve_base
from rankwise.assets.dataset import resolve_data
from rankwise.assets.inventory import DAMAGED, add_base, check_cached, list_cached
from rankwise.settings import Settings


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with one entry of each kind."""
    root = tmp_path_factory.mktemp("inventory")
    settings = Settings.load({"RANKWISE_CACHE": str(root / "cache")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_CONFIG_FILE", "/dev/null")
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(root))
        make_wheel(root, "rows", "1.0", {"rows/x.csv": b"a\n1\n"})
        resolve_data("pypi:rows==1.0#rows/x.csv", None, settings)
    resolve_base(str(make_gguf(root / "tiny.gguf")), None, settings)
    add_base(str(make_base(root / "base")), None, settings)
    shutil.rmtree(root / "base")
    return root / "cache"


@pytest.fixture
def settings(cache, tmp_path):
    return Settings.load({"RANKWISE_CACHE": str(shutil.copytree(cache, tmp_path / "copy"))})


def test_every_entry_is_listed_with_its_pin(settings):
    found = {cached.kind: cached for cached in list_cached(settings)}
    assert set(found) == {"file", "converted", "added"}
    assert found["file"].source == "pypi:rows==1.0#rows/x.csv"
    assert found["converted"].source.startswith("a GGUF, by transformers 5")
    for cached in found.values():
        assert cached.revision.startswith("sha256:")
        assert cached.bytes > 0
        assert check_cached(cached, settings) is None


def test_an_empty_cache_has_no_entries(tmp_path):
    assert list_cached(Settings.load()) == []


def test_an_added_base_is_found_among_the_local_ones_and_keeps_its_pin(settings):
    (added,) = (cached for cached in list_cached(settings) if cached.kind == "added")
    assert added.path in list(local_bases(settings))
    assert resolve_base(str(added.path), added.revision, settings).pinned


@pytest.mark.parametrize(
    ("kind", "name"), [("file", "x.csv"), ("converted", "model.safetensors"), ("added", "config.json")]
)
def test_a_flipped_byte_is_found_by_reading_anew(settings, kind, name):
    (cached,) = (cached for cached in list_cached(settings) if cached.kind == kind)
    content = bytearray((cached.path / name).read_bytes())
    content[-2] ^= 1
    (cached.path / name).write_bytes(content)
    assert f"was {cached.revision if kind != 'converted' else 'sha256:'}" in check_cached(cached, settings)


@pytest.mark.parametrize(("kind", "name"), [("file", "entry.json"), ("converted", "conversion.json")])
@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_damaged_record_is_listed_and_found(settings, kind, name, content):
    (cached,) = (cached for cached in list_cached(settings) if cached.kind == kind)
    (cached.path / name).write_text(content)
    (cached,) = (cached for cached in list_cached(settings) if cached.kind == kind)
    assert cached.source == cached.revision == DAMAGED
    assert check_cached(cached, settings)


def test_a_missing_file_is_found(settings):
    (cached,) = (cached for cached in list_cached(settings) if cached.kind == "file")
    (cached.path / "x.csv").unlink()
    assert "contains 0 files" in check_cached(cached, settings)


def test_a_record_without_its_libraries_says_unknown(settings):
    (cached,) = (cached for cached in list_cached(settings) if cached.kind == "converted")
    record = json.loads((cached.path / "conversion.json").read_text())
    (cached.path / "conversion.json").write_text(json.dumps({**record, "libraries": {}}))
    (cached,) = (cached for cached in list_cached(settings) if cached.kind == "converted")
    assert cached.source == "a GGUF, by transformers unknown"
