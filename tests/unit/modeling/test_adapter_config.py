import json

import pytest
from peft import LoraConfig

from rankwise.exceptions import AdapterIntegrityError
from rankwise.modeling.adapter_config import read_adapter_config, write_adapter_config


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
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"peft_type": None}, "peft_type must be LORA, got None"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "must name a transformers model"),
        ({"auto_mapping": "evil"}, "must name a transformers model"),
        ({"megatron_config": {"x": 1}}, "these are set: megatron_config"),
        ({"layer_replication": [[0, 2]]}, "these are set: layer_replication"),
        ({"corda_config": {"cache_file": "x.pt"}}, "these are set: corda_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"r": 0}, "r must be an integer from 1 to 1,048,576, got 0"),
        ({"r": "8"}, "r must be an integer from 1 to 1,048,576, got '8'"),
        ({"r": None}, "r must be an integer from 1 to 1,048,576, got None"),
        ({"r": True}, "r must be an integer from 1 to 1,048,576, got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, got nan"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a finite number, got 1000"),
        (
            {"lora_dropout": 1.5, "use_dora": ""},
            "lora_dropout must be a number from 0 to 1, got 1.5; use_dora must be true",
        ),
        ({"task_type": "EVIL"}, "task_type must be a task type of peft, such as CAUSAL_LM, got 'EVIL'"),
        ({"rank_pattern": "LORA"}, "rank_pattern must be a mapping of at most 2,000 module names to ranks"),
        ({"rank_pattern": {f"x{i}": 1 for i in range(2001)}}, "rank_pattern must be a mapping of at most 2,000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern must be a mapping"),
        ({"trainable_token_indices": [10**12]}, "trainable_token_indices must be a list of token ids"),
        ({"layers_pattern": "(x+)+"}, "layers_pattern must be a name such as layers"),
        ({"modules_to_save": ["(x+)+"]}, "modules_to_save must be a list of module names"),
        (
            {"target_modules": [""]},
            "target_modules must be a list of module names, a regular expression, or all-linear",
        ),
        ({"exclude_modules": "((((("}, r"exclude_modules: '\(\(\(\(\(' is not a valid regular expression"),
        ({"rank_pattern": {"(?i)x": 2}}, "rank_pattern: .* is not a valid regular expression: global flags"),
        ({"target_modules": "x" * 20_001}, "'target_modules' has more than 20,000 characters"),
        ({"base_model_name_or_path": "a\0b"}, "'base_model_name_or_path' has a character that cannot be printed"),
        ({"base_model_name_or_path": "\ud800"}, "'base_model_name_or_path' has a character that cannot be printed"),
        ({"loftq_config": {"a": {"b": {"c": {"d": {"e": {"f": {}}}}}}}}, "nested deeper than 6 levels"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_that_of_a_plain_adapter_is_refused(directory, change, message):
    edit(directory, **change)
    with pytest.raises(AdapterIntegrityError, match=message):
        read_adapter_config(directory)


@pytest.mark.parametrize("more", [{}, {"unsloth_fixed": True}])
def test_the_mapping_that_peft_and_unsloth_write_is_accepted_and_dropped(directory, more):
    edit(
        directory,
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
            **more,
        },
    )
    assert read_adapter_config(directory).auto_mapping is None


def test_what_peft_ignores_is_dropped(directory):
    before = read_adapter_config(directory).to_dict()
    nulls = dict.fromkeys(key for key in before if key not in {"r", "lora_alpha", "peft_type"})
    kept = {key: before[key] for key in ("target_modules", "lora_dropout", "use_rslora", "revision", "task_type")}
    unknown = {"enable_lora": None, "use_new": False, "x_config": {}, "unsloth_version": "2026.1", "lorap_emb_lr": 1e-6}
    old = {
        "runtime_config": {"ephemeral_gpu_offload": False},
        "loftq_config": {"loftq_bits": 4},
        "eva_config": {"rho": 2.0},
    }
    texts = {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}
    edit(directory, **{**nulls, **texts, **unknown, **old})
    after = read_adapter_config(directory).to_dict()
    assert {key: after[key] for key in ("r", "lora_alpha", "peft_type", *kept)} == {
        key: before[key] for key in ("r", "lora_alpha", "peft_type", *kept)
    }
    assert (after["bias"], after["rank_pattern"], after["eva_config"]) == ("none", {}, None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"r": ' + b"9" * 5000 + b"}",
        b" " * (5 << 20),
    ],
    ids=lambda content: repr(content[:9]),
)
def test_what_is_no_json_object_is_refused(directory, content):
    (directory / "adapter_config.json").write_bytes(content)
    with pytest.raises(
        AdapterIntegrityError, match=r"cannot be read as JSON|must contain a JSON object|larger than 4 MiB"
    ):
        read_adapter_config(directory)


def test_a_missing_configuration_is_refused(tmp_path):
    with pytest.raises(AdapterIntegrityError, match=r"has no adapter_config\.json, so it is not a PEFT adapter"):
        read_adapter_config(tmp_path)
