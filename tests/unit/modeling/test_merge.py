from __future__ import annotations

import pytest
import torch
from helpers.bases import inject, logits, resolved, settings_in
from helpers.tiny import make_base
from torch.testing import assert_close

from rankwise.compat.peft import plain_module
from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.adapter import adapter_tensors
from rankwise.modeling.base import load_base
from rankwise.modeling.merge import merge_adapter, take_dequantized

ROWS = {"embed_tokens": [320, 321], "lm_head": [320, 321]}
CASES = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "all-linear", "r": 2, "use_rslora": True, "task_type": "CAUSAL_LM"}),
    ("llama", {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 8}, "alpha_pattern": {"q_proj": 3}}),
    ("llama", {"target_modules": ["o_proj"], "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": ROWS}),
    ("gpt_neox", {"target_modules": ["query_key_value", "dense_4h_to_h"]}),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    settings = settings_in(root)
    paths = {name: make_base(root / name, name) for name in ("llama", "gpt_neox")}

    def load(name="llama", **quantization):
        return load_base(resolved(paths[name]), QuantizationSpec(**quantization), settings, device="cpu").model

    return load


def adapted(model, **lora):
    if "trainable_token_indices" in lora:
        model.resize_token_embeddings(322, mean_resizing=False)
    return inject(model, **lora)


@pytest.mark.parametrize(("name", "lora"), CASES, ids=str)
@pytest.mark.parametrize("quantized", [True, False])
def test_a_merged_model_computes_what_the_adapted_one_does(load, name, lora, quantized):
    model = adapted(load(name, load_in_4bit=quantized), **lora)
    plain = load(name, load_in_4bit=False)
    if quantized:
        take_dequantized(plain, model)
    tensors = adapter_tensors(model, "arm-1")
    state = torch.get_rng_state()
    merged = merge_adapter(plain, model.peft_config["arm-1"], tensors, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(logits(merged), logits(model), atol=2e-4, rtol=1e-4)
    assert not [
        key for key, _ in merged.named_parameters() if "lora" in key or "base_layer" in key or "token" in key[-9:]
    ]
    assert not hasattr(merged, "peft_config")
    assert merged.config.vocab_size == plain_module(model.get_input_embeddings()).weight.shape[0]


def test_a_merged_weight_is_rounded_once(load):
    model = adapted(load(load_in_4bit=False), target_modules=["q_proj"])
    layer = model.model.layers[1].self_attn.q_proj
    exact = layer.weight.double() + 2.0 * (
        layer.lora_B["arm-1"].weight.double() @ layer.lora_A["arm-1"].weight.double()
    )
    merged = merge_adapter(
        load(load_in_4bit=False), model.peft_config["arm-1"], adapter_tensors(model, "arm-1"), torch.bfloat16
    )
    assert torch.equal(merged.model.layers[1].self_attn.q_proj.weight, exact.to(torch.bfloat16))
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def test_dequantized_weights_are_those_of_the_quantized_base(load):
    quantized, plain = load(), load(load_in_4bit=False)
    before = plain.model.layers[0].mlp.up_proj.weight.clone()
    assert take_dequantized(plain, quantized) == 14
    assert not torch.equal(plain.model.layers[0].mlp.up_proj.weight, before)
    assert torch.equal(logits(plain), logits(quantized))
    with pytest.raises(ConfigError, match="no layer of the base is quantized to 4 bit"):
        take_dequantized(plain, load(load_in_4bit=False))


def test_an_adapter_of_another_shape_or_with_weights_that_are_not_finite_is_refused(load):
    model = adapted(load(load_in_4bit=False))
    config, tensors = model.peft_config["arm-1"], adapter_tensors(model, "arm-1")
    some = dict(list(tensors.items())[1:])
    with pytest.raises(AdapterIntegrityError, match="do not fit the base: base_model"):
        merge_adapter(load(load_in_4bit=False), config, some, torch.float32)
    broken = {name: tensor * float("nan") for name, tensor in tensors.items()}
    with pytest.raises(AdapterIntegrityError, match="cannot be merged: NaNs detected"):
        merge_adapter(load(load_in_4bit=False), config, broken, torch.float32)


# peft warns of the same thing, when the adapter is made.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer is part of the adapter")
def test_a_change_of_a_weight_that_embedding_and_head_share_is_refused(load):
    def tied():
        model = load(load_in_4bit=False)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return model

    model = adapted(tied(), target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(ConfigError, match="changes the embedding, but embedding and head share one weight"):
        merge_adapter(tied(), model.peft_config["arm-1"], adapter_tensors(model, "arm-1"), torch.float32)
