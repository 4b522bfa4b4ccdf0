import dataclasses
import json

import pytest
from helpers.bases import inject, resolved, settings_in
from helpers.tiny import make_base
from peft.tuners.tuners_utils import cast_adapter_dtype

from rankwise.exceptions import ConfigError
from rankwise.experiment.module_names import layer_of, layer_sums
from rankwise.experiment.schema import LoraSpec, QuantizationSpec
from rankwise.modeling.adapter import adapter_tensors
from rankwise.modeling.base import load_base
from rankwise.modeling.estimate import CPU_PROCESS_BYTES, Estimator, match_targets

LLAMA_3_1_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SPECS = {
    "nf4": QuantizationSpec(),
    "nf4-single": QuantizationSpec(bnb_4bit_use_double_quant=False),
    "nf4-bfloat16": QuantizationSpec(bnb_4bit_compute_dtype="bfloat16"),
    "int8": QuantizationSpec(load_in_4bit=False, load_in_8bit=True),
    "none": QuantizationSpec(load_in_4bit=False),
}


def lora(r=8, *targets):
    return LoraSpec(r=r, lora_alpha=2 * r, target_modules=targets or ("q_proj", "v_proj"))


def test_llama_3_1_8b_gives_the_published_numbers():
    estimate = Estimator(LLAMA_3_1_8B).arm(
        lora(32, "q_proj", "k_proj", "v_proj", "o_proj"), QuantizationSpec(), module_dtype="bfloat16"
    )
    assert estimate.adapter_parameters_per_layer == 851_968
    assert estimate.adapter_parameters == 27_262_976
    assert estimate.adapter_bytes_fp32 == 109_051_904
    assert estimate.base.parameters == 8_030_261_248
    assert estimate.base.bytes_fp32 == 32_121_044_992
    assert estimate.base.bytes_bf16 == 16_060_522_496
    assert estimate.base.bytes_quantized == pytest.approx(5.70e9, abs=0.005e9)
    assert len(estimate.targets) == 4 * 32


def test_the_linear_layers_of_llama_3_1_8b_take_3_60_gigabytes_and_the_rest_2_10():
    base = Estimator(LLAMA_3_1_8B).base(QuantizationSpec(), module_dtype="bfloat16")
    rest = 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert rest == pytest.approx(2.10e9, abs=0.005e9)
    assert base.bytes_quantized - rest == pytest.approx(3.60e9, abs=0.005e9)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_estimates_are_what_is_measured_on_a_loaded_model(tmp_path, name):
    path = make_base(tmp_path / name, name)
    estimator = Estimator(path)
    for spec in SPECS.values():
        loaded = load_base(resolved(path), spec, settings_in(tmp_path), device="cpu")
        estimate = estimator.arm(lora_all(4), spec)
        assert estimate.base.bytes_loaded == loaded.memory_bytes
        inject(loaded.model, r=4, target_modules="all-linear")
        # peft gives new factors the dtype of the base; rankwise trains and stores them in float32.
        cast_adapter_dtype(loaded.model, "arm-1")
        tensors = adapter_tensors(loaded.model, "arm-1")
        assert estimate.adapter_parameters == sum(tensor.numel() for tensor in tensors.values())
        assert estimate.memory_inference_bytes == loaded.memory_bytes
        assert {target.module for target in estimate.targets} == {
            key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors
        }


def lora_all(r):
    return LoraSpec(r=r, lora_alpha=r, target_modules="all-linear")


def test_all_linear_is_every_linear_layer_but_the_head(tmp_path):
    estimate = Estimator(make_base(tmp_path / "base")).arm(lora_all(2), QuantizationSpec())
    assert len(estimate.targets) == 2 * 7
    assert not any("lm_head" in target.module for target in estimate.targets)


def test_a_configuration_is_a_dict_a_file_or_a_directory(tmp_path):
    path = make_base(tmp_path / "base")
    config = json.loads((path / "config.json").read_text())
    estimates = [Estimator(source).arm(lora(), QuantizationSpec()) for source in (config, path / "config.json", path)]
    assert estimates[0] == estimates[1] == estimates[2]


def test_layers_that_differ_have_no_common_number(tmp_path):
    estimate = Estimator(make_base(tmp_path / "base")).arm(
        lora(4, "model.layers.0.self_attn.q_proj", "v_proj"), QuantizationSpec()
    )
    assert estimate.adapter_parameters_per_layer is None
    assert len(estimate.targets) == 3


def test_training_memory_adds_gradients_and_optimizer_to_the_adapter(tmp_path):
    estimate = Estimator(make_base(tmp_path / "base")).arm(lora(), QuantizationSpec())
    weights = estimate.base.bytes_loaded + 16 * estimate.adapter_parameters
    assert estimate.memory_bytes == weights + estimate.process_bytes
    assert estimate.process_bytes == CPU_PROCESS_BYTES
    assert estimate.to_dict()["memory_bytes"] == estimate.memory_bytes


def test_the_json_of_plan_has_flat_numbers(tmp_path):
    values = Estimator(make_base(tmp_path / "base")).arm(lora(), QuantizationSpec()).to_dict()
    assert set(values) == {
        "adapter_parameters", "adapter_bytes_fp32", "adapter_parameters_per_layer", "base_parameters",
        "base_bytes_fp32", "base_bytes_bf16", "base_bytes_quantized", "base_bytes_loaded", "process_bytes",
        "memory_bytes", "base_share_4bit",
    }  # fmt: skip
    assert values.pop("base_share_4bit") == 1.0
    assert all(isinstance(value, int) for value in values.values())


def test_unknown_targets_are_all_named_with_what_there_is():
    with pytest.raises(ConfigError) as raised:
        Estimator(LLAMA_3_1_8B).arm(lora(8, "q_prj", "v_proj", "wat"), QuantizationSpec())
    first, second = raised.value.problems
    assert first == (
        "lora.target_modules: the base has no linear layer 'q_prj'; did you mean 'q_proj'? "
        "It has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    )
    assert second.startswith("lora.target_modules: the base has no linear layer 'wat'. It has down_proj")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no model_type"),
        ({"model_type": "wat"}, "does not know the base's model_type 'wat'"),
        ({"model_type": "vit"}, "there is no causal language model of type 'vit'"),
    ],
    ids=str,
)
def test_an_architecture_that_is_not_known_is_a_configuration_error(config, message):
    with pytest.raises(ConfigError, match=message):
        Estimator(config).arm(lora(), QuantizationSpec())


def test_a_missing_file_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"the base's configuration: .*nothing\.json"):
        Estimator(tmp_path / "nothing.json").arm(lora(), QuantizationSpec())


def test_a_name_stands_for_the_layers_that_end_in_it():
    linear = {"a.0.q_proj": (1, 2), "a.0.xq_proj": (1, 2), "q_proj": (3, 4)}
    assert match_targets(linear, ["q_proj"]) == {"a.0.q_proj": (1, 2), "q_proj": (3, 4)}
    assert match_targets(linear, ["0.q_proj"]) == {"a.0.q_proj": (1, 2)}
    assert match_targets(linear, "all-linear") == linear


def test_layers_are_told_by_their_number():
    assert layer_of("model.layers.31.mlp.up_proj") == 31
    assert layer_of("transformer.h.0") == 0
    assert layer_of("lm_head") is None
    assert layer_sums([("a.0.x", 1), ("a.1.x", 2), ("a.0.y", 3), ("b", 5)]) == {0: 4, 1: 2, None: 5}


def test_a_gpt2_base_has_linear_layers_of_another_class():
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 64}
    estimate = Estimator(config).arm(lora(4, "c_attn"), QuantizationSpec())
    assert [(t.lora_A, t.lora_B) for t in estimate.targets] == [((4, 32), (96, 4))] * 2


def test_targets_know_their_parameters():
    estimate = Estimator(LLAMA_3_1_8B).arm(lora(32, "k_proj"), QuantizationSpec())
    target = estimate.targets[0]
    assert (target.lora_A, target.lora_B, target.parameters) == ((32, 4096), (1024, 32), 32 * (4096 + 1024))
    assert dataclasses.asdict(target)["module"] == "model.layers.0.self_attn.k_proj"
