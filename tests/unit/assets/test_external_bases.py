import dataclasses
import hashlib
import os
import shutil

import pytest
from helpers.bases import settings_in
from helpers.tiny import make_base
from huggingface_hub import constants

from rankwise import digests as digest
from rankwise.assets.base import check_external_base, list_external_bases, resolve_base

COMMIT = "a1" * 20


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("original") / "base")


@pytest.fixture
def settings(original, tmp_path, monkeypatch):
    """A machine with one base in Hugging Face's cache, as its client lays it out, and one in a listed directory."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for file in original.iterdir():
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        name = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)
        blob = repository / "blobs" / name.hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    shutil.copytree(original, tmp_path / "shelf" / "one")
    (tmp_path / "shelf" / "half").mkdir()
    (tmp_path / "shelf" / "half" / "config.json").write_text("{}")
    return dataclasses.replace(settings_in(tmp_path), bases=(tmp_path / "shelf",))


def test_whole_bases_of_the_hub_s_cache_and_of_listed_directories_are_found(settings, tmp_path, original):
    hub, listed = list_external_bases(settings)
    assert (hub.kind, hub.source, hub.revision) == ("hub", "org/tiny", COMMIT)
    assert (listed.kind, listed.source, listed.revision) == ("listed", str(tmp_path / "shelf" / "one"), None)
    assert hub.bytes == listed.bytes == sum(file.stat().st_size for file in original.iterdir())
    assert [check_external_base(base, settings) for base in (hub, listed)] == [None, None]


@pytest.mark.parametrize(("name", "words"), [("model.safetensors", "sha256:"), ("config.json", "git's hash")])
def test_a_blob_that_is_not_what_its_name_claims_is_named(settings, name, words):
    hub = list_external_bases(settings)[0]
    blob = (hub.path / name).resolve()
    content = bytearray(blob.read_bytes())
    content[-2] ^= 1
    blob.write_bytes(content)
    problem = check_external_base(hub, settings)
    assert problem is not None
    assert problem.startswith(f"{name} ")
    assert words in problem
    assert f"its name in the cache says {'sha256:' if name.startswith('model') else ''}{blob.name}" in problem


def test_bytes_that_changed_under_an_unchanged_file_are_noticed(settings, monkeypatch):
    """As a failing disk does it: no write, no new time."""
    listed = list_external_bases(settings)[1]
    # The clock's tick: files this young are not remembered.
    monkeypatch.setattr(digest, "_CLOCK_TICK_NS", -(10**12))
    resolve_base(listed.source, None, settings)
    assert check_external_base(listed, settings) is None
    monkeypatch.setattr(digest, "_read", lambda path, sha256, progress: sha256.update(b"other bytes"))
    problem = check_external_base(listed, settings)
    assert problem is not None
    assert f"model.safetensors is {digest.content_digest(b'other bytes')}, was sha256:" in problem
    assert "neither its size nor its times have changed" in problem


def test_a_base_that_vanished_since_it_was_listed_is_a_problem_and_no_crash(settings):
    listed = list_external_bases(settings)[1]
    shutil.rmtree(listed.path)
    assert "No such file or directory" in str(check_external_base(listed, settings))
