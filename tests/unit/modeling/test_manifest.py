import json
import os
import random
import shutil

import pytest

from rankwise.exceptions import AdapterIntegrityError
from rankwise.modeling.fingerprint import MANIFEST_NAME, check_manifest, write_manifest


@pytest.fixture
def directory(tmp_path):
    root = tmp_path / "model"
    (root / "adapter").mkdir(parents=True)
    (root / "adapter" / "adapter_model.safetensors").write_bytes(random.Random(0).randbytes(4096))
    (root / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    (root / "requirements.txt").write_text("peft\n")
    (root / "empty").write_bytes(b"")
    write_manifest(root)
    return root


def test_untouched_files_pass_and_give_the_manifests_digest(directory):
    digest = check_manifest(directory)
    assert digest.startswith("sha256:")
    assert check_manifest(directory, digest=digest) == digest


def test_writing_twice_gives_the_same_digest(directory):
    assert write_manifest(directory) == check_manifest(directory) == write_manifest(directory)


def test_a_copy_elsewhere_passes(directory, tmp_path):
    copy = shutil.copytree(directory, tmp_path / "copy")
    assert check_manifest(copy) == check_manifest(directory)


def test_a_flipped_byte_anywhere_in_any_file_is_refused(directory):
    files = [p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST_NAME and p.stat().st_size]
    assert len(files) == 3
    for path in files:
        content = path.read_bytes()
        for position in {0, len(content) // 3, len(content) // 2, len(content) - 1}:
            broken = bytearray(content)
            broken[position] ^= 1
            path.write_bytes(broken)
            with pytest.raises(AdapterIntegrityError, match=rf"{path.name}: sha256 [0-9a-f]{{64}}, expected"):
                check_manifest(directory)
        path.write_bytes(content)
    check_manifest(directory)


def test_a_truncated_file_is_refused(directory):
    path = directory / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterIntegrityError, match=r"4095 bytes, expected 4096"):
        check_manifest(directory)


def test_a_missing_file_is_refused(directory):
    (directory / "empty").unlink()
    with pytest.raises(AdapterIntegrityError, match="missing: empty"):
        check_manifest(directory)


def test_a_surplus_file_is_refused(directory):
    (directory / "adapter" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(AdapterIntegrityError, match=r"surplus: adapter/adapter_model\.bin"):
        check_manifest(directory)


def test_exchanged_files_are_refused(directory):
    one, other = directory / "requirements.txt", directory / "adapter" / "adapter_config.json"
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
    with pytest.raises(AdapterIntegrityError, match=r"(?s)adapter_config.*requirements"):
        check_manifest(directory)


def test_all_differences_are_named_at_once(directory):
    (directory / "empty").unlink()
    (directory / "more").write_text("x")
    with pytest.raises(AdapterIntegrityError, match=r"(?s)missing: empty.*surplus: more"):
        check_manifest(directory)


def test_what_mlflow_adds_at_the_root_is_no_surplus(directory):
    (directory / "MLmodel").write_text("x")
    (directory / "registered_model_meta").write_text("x")
    check_manifest(directory)
    (directory / "adapter" / "MLmodel").write_text("x")
    with pytest.raises(AdapterIntegrityError, match="surplus: adapter/MLmodel"):
        check_manifest(directory)


def test_a_rewritten_manifest_is_noticed_by_its_digest(directory):
    digest = check_manifest(directory)
    (directory / "requirements.txt").write_text("other\n")
    write_manifest(directory)
    with pytest.raises(AdapterIntegrityError, match="is not the stored manifest"):
        check_manifest(directory, digest=digest)


def test_links_are_refused(directory, tmp_path):
    (tmp_path / "outside").write_text("x")
    (directory / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(AdapterIntegrityError, match="is a link"):
        check_manifest(directory)


def test_what_is_no_plain_file_is_refused(directory):
    os.mkfifo(directory / "pipe")
    with pytest.raises(AdapterIntegrityError, match="pipe is a link or a special file"):
        check_manifest(directory)


def test_a_directory_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(AdapterIntegrityError, match=r"has no manifest\.json"):
        check_manifest(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"format": "rankwise-manifest", "version": 1}',
     b'{"format": "rankwise-manifest", "version": 1, "files": {"a": {}}}',
     b'{"format": "rankwise-manifest", "version": 1, "files": []}'],
)  # fmt: skip
def test_a_manifest_that_cannot_be_parsed_is_refused(directory, content):
    (directory / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(AdapterIntegrityError, match="is not a manifest"):
        check_manifest(directory)


@pytest.mark.parametrize(
    ("change", "shown"),
    [({"version": 2}, "'rankwise-manifest' version 2"), ({"format": "other"}, "'other' version 1")],
    ids=["newer", "of another kind"],
)
def test_a_manifest_of_another_format_is_refused_by_its_name(directory, change, shown):
    document = json.loads((directory / MANIFEST_NAME).read_bytes())
    (directory / MANIFEST_NAME).write_text(json.dumps({**document, **change}))
    with pytest.raises(
        AdapterIntegrityError, match=rf"has format {shown}; this release reads 'rankwise-manifest' version 1"
    ) as caught:
        check_manifest(directory)
    assert "is not a manifest" not in str(caught.value)
