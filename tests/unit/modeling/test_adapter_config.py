import json

import pytest
from peft import LoraConfig

from rankwise.exceptions import AdapterIntegrityError
from rankwise.modeling.adapter import read_adapter_config, write_adapter_config


@pytest.fixture
def directory(tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["v_proj", "q_proj"], lora_dropout=0.1, use_rslora=True)
    write_adapter_config(config, tmp_path, base_source="org/x", base_revision="b" * 40)
    return tmp_path


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_configuration_survives_being_written(directory):
    config = read_adapter_config(directory)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (4, 8, 0.1, True)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert (config.base_model_name_or_path, config.revision) == ("org/x", "b" * 40)


def test_target_modules_are_sorted_so_that_the_bytes_do_not_change(directory):
    assert json.loads((directory / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_code_to_be_run_is_refused_wherever_it_hides(directory):
    edit(directory, alpha_pattern={"x": {"auto_map": {"AutoModel": "evil.Model"}}})
    with pytest.raises(AdapterIntegrityError, match="has auto_map"):
        read_adapter_config(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "has auto_map"),
        ({"surprise": 1}, r"keys that peft [\d.]+ does not know: surprise \(written by peft"),
        ({"runtime_config": {}}, "does not know: runtime_config"),
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"peft_type": None}, "peft_type must be LORA, got None"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "must name a transformers model"),
        ({"auto_mapping": "evil"}, "must name a transformers model"),
        ({"megatron_config": {"x": 1}}, "these are set: megatron_config"),
        ({"layer_replication": [[0, 2]]}, "these are set: layer_replication"),
        ({"corda_config": {"cache_file": "x.pt"}}, "these are set: corda_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"r": 0}, "r"),
        ({"r": "8"}, "r must be a positive integer, got '8'"),
        ({"bias": "none", "task_type": "EVIL"}, "rejects it"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_that_of_a_plain_adapter_is_refused(directory, change, message):
    edit(directory, **change)
    with pytest.raises(AdapterIntegrityError, match=message):
        read_adapter_config(directory)


def test_the_mapping_that_peft_itself_writes_is_accepted_and_dropped(directory):
    edit(
        directory,
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        },
    )
    assert read_adapter_config(directory).auto_mapping is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff"])
def test_what_is_no_json_object_is_refused(directory, content):
    (directory / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterIntegrityError, match=r"cannot be read as JSON|must contain a JSON object"):
        read_adapter_config(directory)


def test_a_missing_configuration_is_refused(tmp_path):
    with pytest.raises(AdapterIntegrityError, match=r"has no adapter_config\.json, so it is not a PEFT adapter"):
        read_adapter_config(tmp_path)
