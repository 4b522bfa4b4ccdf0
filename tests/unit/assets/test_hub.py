"""What needs no hub: a snapshot in Hugging Face's cache, made here file by file. With a hub: tests/integration."""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers.tiny import make_base

from rankwise.assets import hub
from rankwise.assets.base import resolve_base
from rankwise.assets.hub import check_blobs, resolve_commit
from rankwise.assets.layout import INDEX
from rankwise.exceptions import AssetError, StorageError
from rankwise.settings import Settings

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def offline():
    return replace(Settings.load(), offline=True)


@pytest.fixture
def snapshot(whole, tmp_path, monkeypatch):
    """`org/tiny` as the hub's client keeps it: blobs by their hash, links to them by commit, the commit of `main`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("used the network"))
    repo = tmp_path / "hub" / "models--org--tiny"
    folder = repo / "snapshots" / COMMIT
    for directory in (folder, repo / "blobs", repo / "refs"):
        directory.mkdir(parents=True)
    for file in whole.iterdir():
        content = file.read_bytes()
        name = (
            hashlib.sha256(content).hexdigest() if file.suffix == ".safetensors" else hashlib.sha1(content).hexdigest()
        )
        (repo / "blobs" / name).write_bytes(content)
        (folder / file.name).symlink_to(f"../../blobs/{name}")
    (repo / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_commit_in_the_cache_needs_no_network(snapshot, offline):
    for settings in (offline, replace(offline, offline=False)):
        base = resolve_base("org/tiny", COMMIT, settings)
        assert (base.source, base.revision, base.path, base.pinned) == ("org/tiny", COMMIT, snapshot, True)


def test_offline_the_commit_of_main_is_the_one_last_seen_and_it_is_said(snapshot, offline, caplog):
    with caplog.at_level(logging.WARNING, "rankwise"):
        base = resolve_base("org/tiny", None, offline)
    assert (base.revision, base.pinned) == (COMMIT, False)
    assert f"using the last known commit of 'main': {COMMIT}" in caplog.text


def test_offline_an_unknown_branch_is_an_error_with_advice(snapshot, offline):
    with pytest.raises(AssetError, match=r"org/tiny at dev .*HF_HUB_OFFLINE is set.*use a local path") as caught:
        resolve_commit("org/tiny", "dev", offline)
    assert caught.value.exit_code == 3


def test_offline_what_is_not_in_the_cache_is_an_error_with_advice(snapshot, offline):
    with pytest.raises(
        AssetError, match=rf"org/other at {COMMIT} is not complete in the cache .*HF_HUB_OFFLINE is set"
    ):
        resolve_base("org/other", COMMIT, offline)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_snapshot_that_lacks_a_part_is_not_taken(snapshot, offline, name):
    (snapshot / name).unlink()
    with pytest.raises(AssetError, match="is not complete in the cache"):
        resolve_base("org/tiny", COMMIT, offline)


def test_a_snapshot_that_lacks_a_shard_is_not_taken(snapshot, offline):
    (snapshot / "model.safetensors").rename(snapshot / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / INDEX).write_text(json.dumps(index))
    with pytest.raises(AssetError, match="is not complete in the cache"):
        resolve_base("org/tiny", COMMIT, offline)


def test_a_copy_of_a_snapshot_elsewhere_is_a_base_with_a_digest(snapshot, offline, tmp_path):
    shutil.copytree(snapshot, tmp_path / "copy")
    one = resolve_base(str(tmp_path / "copy"), None, offline)
    two = resolve_base(str(snapshot), None, offline)
    assert one.revision == two.revision
    assert one.revision.startswith("sha256:")


def test_a_blob_that_is_not_what_its_name_says_is_found(snapshot, offline):
    check_blobs(snapshot, offline)
    blob = (snapshot / "model.safetensors").resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(
        AssetError, match=f"(?s)wrong digest of .*expected sha256:{blob.name}.*remove {blob} and run again"
    ):
        check_blobs(snapshot, offline)


def test_a_cached_configuration_with_code_is_refused(snapshot, offline):
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(AssetError, match="'auto_map': it requires Python code"):
        resolve_base("org/tiny", COMMIT, offline)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_a_download_is_explained(snapshot, offline, monkeypatch, number):
    import huggingface_hub

    cached = huggingface_hub.snapshot_download

    def download(*arguments, local_files_only=False, **options):
        if local_files_only:
            return cached(*arguments, local_files_only=True, **options)
        raise OSError(number, os.strerror(number), "/hub/blobs/x.incomplete")

    siblings = [SimpleNamespace(rfilename="model.safetensors", size=1)]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(StorageError, match=r"downloading org/other: cannot write /hub/blobs/x\.incomplete: ") as caught:
        resolve_base("org/other", COMMIT, replace(offline, offline=False))
    assert caught.value.exit_code == 3


def test_a_shared_cache_that_is_read_only_still_serves_a_branch(snapshot, offline, monkeypatch, caplog):
    import huggingface_hub

    def refuse(path, content, *, shared):
        raise StorageError(f"cannot write {path}")

    monkeypatch.setattr(hub, "write_atomically", refuse)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: SimpleNamespace(sha=COMMIT))
    with caplog.at_level(logging.WARNING, "rankwise"):
        assert resolve_base("org/tiny", "v1", replace(offline, offline=False)).revision == COMMIT
    assert "could not store the commit of 'v1' of org/tiny for use offline" in caplog.text
