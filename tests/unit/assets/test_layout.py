import json

import pytest
from helpers.tiny import make_base

from rankwise.assets.layout import INDEX, base_files, check_base, is_base_file, missing_parts
from rankwise.exceptions import AssetError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(whole, tmp_path):
    path = tmp_path / "base"
    path.mkdir()
    for file in whole.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_a_saved_model_and_tokenizer_are_a_base(base):
    assert missing_parts(base) == []
    check_base(base, "x")


@pytest.mark.parametrize(
    ("name", "belonging"),
    [
        ("model-00001-of-00002.safetensors", True),
        (INDEX, True),
        ("config.json", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tools.jinja", True),
        ("merges.txt", True),
        ("consolidated.safetensors", False),
        ("original/params.json", False),
        ("onnx/model.safetensors", False),
        ("pytorch_model.bin", False),
        ("modeling_x.py", False),
        ("README.md", False),
        ("adapter_config.json", False),
    ],
)
def test_what_belongs_to_a_base(name, belonging):
    assert is_base_file(name) is belonging


def test_the_files_of_a_base_leave_out_the_rest_of_its_directory(base):
    for name in ("README.md", "modeling.py", "pytorch_model.bin"):
        (base / name).write_bytes(b"x")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("x")
    names = [file.relative_to(base).as_posix() for file in base_files(base)]
    assert names == sorted(names)
    assert {"config.json", "model.safetensors", "tokenizer.json", "additional_chat_templates/tools.jinja"} <= set(names)
    assert not {"README.md", "modeling.py", "pytorch_model.bin"} & set(names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "lacks config.json"),
        ("tokenizer.json", r"lacks a tokenizer \(tokenizer.json"),
        ("model.safetensors", "no safetensors weights; found chat_template"),
    ],
)
def test_a_missing_part_is_named(base, name, message):
    (base / name).unlink()
    with pytest.raises(AssetError, match=message):
        check_base(base, "x")


def test_a_missing_shard_is_named(base):
    (base / "model.safetensors").unlink()
    (base / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(AssetError, match=f"lacks model-1.safetensors; {INDEX} names it"):
        check_base(base, "x")


def test_pickled_weights_are_refused_with_the_reason(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(
        AssetError, match=r"org/x has its weights as pytorch_model.bin only: pickles can run code.*safetensors"
    ):
        check_base(base, "org/x")


def test_a_directory_of_ggufs_says_to_name_the_file(base):
    (base / "model.safetensors").rename(base / "x.Q4_0.gguf")
    with pytest.raises(AssetError, match=r"GGUF files \(x.Q4_0.gguf\): download one and use the file itself"):
        check_base(base, "org/x")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_out_of_a_base_is_refused(base, name):
    content = json.loads((base / name).read_text())
    (base / name).write_text(json.dumps({**content, "auto_map": {"AutoModel": "modeling.Evil"}}))
    with pytest.raises(AssetError, match=rf"{name} has 'auto_map': it requires Python code"):
        check_base(base, "x")


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_a_broken_configuration_is_named(base, content):
    (base / "config.json").write_text(content)
    with pytest.raises(AssetError, match=r"config\.json"):
        check_base(base, "x")
