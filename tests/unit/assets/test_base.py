import shutil

import pytest
from helpers.bases import settings_in
from helpers.gguf_file import make_gguf
from helpers.tiny import make_base

from rankwise import digests as digest
from rankwise.assets.base import find_config, local_bases, resolve_base
from rankwise.exceptions import AssetError, ConfigError
from rankwise.settings import Settings

OTHER = f"sha256:{'0' * 64}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture
def settings():
    return Settings.load()


def test_a_directory_gets_the_digest_of_its_files_as_its_pin(base, settings):
    found = resolve_base(str(base), None, settings)
    assert (found.source, found.path, found.pinned) == (str(base), base, False)
    again = resolve_base(str(base), found.revision, settings)
    assert (again.revision, again.pinned) == (found.revision, True)


def test_a_relative_path_is_recorded_as_an_absolute_one(base, settings, monkeypatch):
    monkeypatch.chdir(base.parent)
    assert resolve_base("./tiny", None, settings).source == str(base)
    assert resolve_base("tiny", None, settings).path == base


def test_files_that_are_no_part_of_a_base_do_not_change_its_pin(base, settings, tmp_path):
    shutil.copytree(base, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card")
    assert (
        resolve_base(str(tmp_path / "copy"), None, settings).revision
        == resolve_base(str(base), None, settings).revision
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_flipped_byte_in_any_part_of_a_base_is_a_wrong_digest(base, settings, tmp_path, name):
    pin = resolve_base(str(base), None, settings).revision
    copy = shutil.copytree(base, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[-2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(AssetError, match=f"(?s)wrong digest of .*expected {pin}|config.json|tokenizer"):
        resolve_base(str(copy), pin, settings)


def test_a_wrong_pin_names_both_digests_and_the_key(base, settings):
    actual = resolve_base(str(base), None, settings).revision
    with pytest.raises(AssetError, match=f"(?s)expected {OTHER}\n  found    {actual}\n.*base_model_revision: {actual}"):
        resolve_base(str(base), OTHER, settings)


@pytest.mark.parametrize(
    ("base_model", "revision", "error", "message"),
    [
        ("./nowhere", None, AssetError, r"base_model: /.*/nowhere does not exist; use a directory, a GGUF file"),
        ("pypi:x==1#x/model.safetensors", None, ConfigError, "a single file must be a GGUF"),
        ("rows.jsonl", None, ConfigError, "a single file must be a GGUF"),
        ("no such thing", None, ConfigError, "^base_model: must be org/name"),
        ("./nowhere", "main", ConfigError, "^base_model_revision: must be 'sha256:'"),
    ],
)
def test_what_is_no_base_is_refused(settings, tmp_path, monkeypatch, base_model, revision, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    with pytest.raises(error, match=message):
        resolve_base(base_model, revision, settings)


def test_a_directory_without_weights_is_refused(settings, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(AssetError, match="no safetensors weights"):
        resolve_base(str(tmp_path), None, settings)


def test_hashing_tells_how_far_it_is_if_it_takes_long(base, settings, recorder, monkeypatch):
    resolve_base(str(base), None, settings, recorder)
    assert recorder.done == {}
    monkeypatch.setattr(digest, "_WORTH_A_BAR", 0)
    # Files as young as these may not be remembered yet, and then there is no cache.
    shutil.rmtree(settings.cache, ignore_errors=True)
    resolve_base(str(base), None, settings, recorder)
    size = (base / "model.safetensors").stat().st_size
    assert recorder.done["hashing model.safetensors"] == (size, size, "B")


def test_local_bases_are_those_of_the_named_directories_and_of_the_cache(base, tmp_path):
    settings = Settings.load({"RANKWISE_BASES": f"{base}:{base.parent}:/nowhere", "RANKWISE_CACHE": str(tmp_path)})
    cached = tmp_path / "bases" / "gguf-x"
    for folder in (cached, tmp_path / "bases" / ".gguf-y.tmp"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    assert list(local_bases(settings)) == [base, base, cached]


def test_a_configuration_is_named_by_itself_or_by_its_directory(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in (tmp_path, tmp_path / "config.json"):
        assert find_config(str(name), settings_in(tmp_path)) == tmp_path / "config.json"


def test_of_a_gguf_it_is_that_of_what_it_becomes(tmp_path):
    path = find_config(str(make_gguf(tmp_path / "tiny.gguf")), settings_in(tmp_path))
    assert path.parent.name.startswith("gguf-")
    assert path.is_file()


def test_what_is_nowhere_is_an_error(tmp_path):
    with pytest.raises(AssetError, match="does not exist"):
        find_config(str(tmp_path / "nothing"), settings_in(tmp_path))
