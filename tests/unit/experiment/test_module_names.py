from __future__ import annotations

import json

import pytest
from helpers.tiny import make_base

from rankwise.experiment.module_names import LINEAR_MODULES, NOT_TARGETS, known_modules, read_config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "llama")


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def test_names_come_from_the_headers_of_a_local_base(base):
    names, origin = known_modules(base, None)
    assert set(names) == set(LINEAR_MODULES["llama"])
    assert origin == f"the weights in {base}"


@pytest.mark.parametrize("architecture", ["qwen2", "gpt_neox"])
def test_the_shipped_lists_agree_with_real_models(architecture, tmp_path):
    names, _ = known_modules(make_base(tmp_path / "base", architecture), None)
    assert set(names) == set(LINEAR_MODULES[architecture])


def test_without_weights_the_model_type_says(tmp_path):
    config = write(tmp_path / "c.json", {"model_type": "phi3"})
    assert known_modules(None, config) == (LINEAR_MODULES["phi3"], "the model type phi3")
    write(tmp_path / "config.json", {"model_type": "gpt2"})
    assert known_modules(tmp_path, None)[0] == LINEAR_MODULES["gpt2"]


def test_an_unknown_type_or_nothing_at_all_is_no_answer(tmp_path):
    assert known_modules(None, write(tmp_path / "x.json", {"model_type": "new"})) is None
    assert known_modules(None, None) is None


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10\x00\x00\x00\x00\x00\x00\x00{not json......"])
def test_a_broken_weight_file_is_said_by_name(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"the header of .*model\.safetensors cannot be read"):
        known_modules(tmp_path, None)


def test_a_configuration_must_be_a_json_object(tmp_path):
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_config(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="is not a JSON object"):
        read_config(write(tmp_path / "list.json", [1]))


def test_no_shipped_list_has_embeddings_or_output_layers():
    for model_type, names in LINEAR_MODULES.items():
        assert NOT_TARGETS.isdisjoint(names), model_type
