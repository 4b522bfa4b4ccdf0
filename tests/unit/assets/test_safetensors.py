import json
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rankwise.assets.layout import INDEX, read_header, tensors, tensors_digest, weight_files
from rankwise.exceptions import AssetError


@pytest.fixture
def values():
    random = np.random.default_rng(0)
    return {
        "b.weight": random.standard_normal((3, 4)).astype(np.float32),
        "a.weight": random.standard_normal((2, 3)).astype(np.float16),
        "a.bias": np.zeros((0,), dtype=np.float32),
    }


def shard(path, values):
    """The same tensors in two files, with an index."""
    path.mkdir()
    names = {}
    for number, name in enumerate(sorted(values)):
        file = f"model-{number % 2}.safetensors"
        names[name] = file
    for file in set(names.values()):
        save_file({name: values[name] for name in values if names[name] == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def test_a_header_agrees_with_the_library_that_wrote_it(tmp_path, values):
    save_file(values, tmp_path / "model.safetensors", metadata={"format": "np"})
    found = {entry.name: entry for entry in read_header(tmp_path / "model.safetensors")}
    content = (tmp_path / "model.safetensors").read_bytes()
    assert {name: entry.shape for name, entry in found.items()} == {name: v.shape for name, v in values.items()}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert content[found[name].start : found[name].stop] == value.tobytes()


def test_the_digest_of_tensors_does_not_depend_on_how_they_are_sharded(tmp_path, values):
    (tmp_path / "one").mkdir()
    save_file(values, tmp_path / "one" / "model.safetensors")
    shard(tmp_path / "two", values)
    assert tensors_digest(tmp_path / "one") == tensors_digest(tmp_path / "two")


@pytest.mark.parametrize("change", ["byte", "name", "shape", "dtype"])
def test_the_digest_of_tensors_covers_name_dtype_shape_and_bytes(tmp_path, values, change):
    save_file(values, tmp_path / "model.safetensors")
    before = tensors_digest(tmp_path)
    match change:
        case "byte":
            values["b.weight"].view(np.uint8)[0, 0] ^= 1
        case "name":
            values["c.weight"] = values.pop("b.weight")
        case "shape":
            values["b.weight"] = values["b.weight"].reshape(4, 3)
        case "dtype":
            values["b.weight"] = values["b.weight"].view(np.int32)
    save_file(values, tmp_path / "model.safetensors")
    assert tensors_digest(tmp_path) != before


def test_tensors_of_all_shards_come_sorted_by_name(tmp_path, values):
    assert [entry.name for entry in tensors(shard(tmp_path / "x", values))] == sorted(values)


def test_a_whole_file_comes_before_an_index_as_in_transformers(tmp_path, values):
    path = shard(tmp_path / "x", values)
    save_file(values, path / "model.safetensors")
    assert weight_files(path) == [path / "model.safetensors"]


def test_a_directory_without_weights_has_no_weight_files(tmp_path):
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert weight_files(tmp_path) == []


@pytest.mark.parametrize(
    "index",
    ["{}", "[]", "{", '{"weight_map": []}', '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": 1}}'],
)
def test_a_wrong_index_is_refused(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(AssetError, match=r"model\.safetensors\.index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "claims 0 of 0 bytes"),
        (b"1234567", "claims 0 of 7 bytes"),
        (struct.pack("<Q", 100) + b"{}", "claims 100 of 10 bytes"),
        (struct.pack("<Q", 2) + b"[]", "not a safetensors file"),
        (struct.pack("<Q", 2) + b"{!", "not a safetensors file"),
        (struct.pack("<Q", 12) + b'{"a": {"b":1', "not a safetensors file"),
    ],
)
def test_what_is_not_safetensors_is_refused(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(AssetError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_a_cut_off_file_is_refused(tmp_path, values):
    path = tmp_path / "model.safetensors"
    save_file(values, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AssetError, match="is truncated: the tensor"):
        read_header(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AssetError, match=r"cannot read .*/none\.safetensors"):
        read_header(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 200_000, "not a safetensors file"),
        (
            b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}',
            "cannot have 4 bytes|is truncated",
        ),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000000]}}', "is truncated"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', "cannot have 4 bytes|is truncated"),
    ],
    ids=["deep", "shape", "end", "before"],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(tmp_path, header, message):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(AssetError, match=message):
        read_header(tmp_path / "x.safetensors")


def test_a_header_of_exabytes_is_refused_at_once(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(AssetError, match=f"claims {2**62} of 10 bytes"):
        read_header(tmp_path / "x.safetensors")
