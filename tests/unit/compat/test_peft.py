"""The private names of peft do what rankwise relies on."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from rankwise.compat.peft import (
    DEPRECATED_CHECKPOINTING,
    SEVERAL_ADAPTERS,
    base_name,
    by_pattern,
    deactivate_adapters,
    is_adapted_linear,
    is_plain_lora,
    one_active_adapter,
    plain_module,
)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, ids):
        return self.head(self.down(self.up(self.embed(ids))))


def adapted(*names, **lora):
    """A tiny model with adapters whose products are not zero; the first one is active."""
    model = Tiny()
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["up", "down"], **lora})
            inject_adapter_in_model(config, model, name)
    return model


def llama():
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    return AutoModelForCausalLM.from_config(config)


IDS = torch.tensor([[1, 2, 3]])


def test_a_second_adapter_causes_exactly_the_known_warning():
    model = Tiny()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), model, "one")
    with pytest.warns(UserWarning, match="Already found") as caught:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), model, "two")
    assert [str(warning.message) for warning in caught] == [SEVERAL_ADAPTERS]


def test_wrapping_a_model_causes_exactly_the_known_warning():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert {str(warning.message) for warning in caught} == {DEPRECATED_CHECKPOINTING}


def test_every_parameter_of_a_base_is_found_by_its_name():
    model = llama()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3]}
    )
    inject_adapter_in_model(config, model, "one")
    names = {base_name(name): parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert any("base_layer" in name for name, _ in model.named_parameters())
    assert any("original_module" in name for name, _ in model.named_parameters())
    assert any("token_adapter" in name for name, _ in model.named_parameters())
    assert {name: names.get(name) for name in before} == before


def test_an_embedding_and_a_head_are_found_below_what_peft_puts_around_them():
    model = llama()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3]}
    )
    inject_adapter_in_model(config, model, "one")
    assert model.get_input_embeddings() is not embedding
    assert model.get_output_embeddings() is not head
    assert plain_module(model.get_input_embeddings()) is embedding
    assert plain_module(model.get_output_embeddings()) is head
    assert plain_module(embedding) is embedding


def test_an_embedding_that_is_a_target_is_found_too():
    model = Tiny()
    embedding = model.embed
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["embed"]), model, "one")
    assert isinstance(model.embed, LoraLayer)
    assert plain_module(model.embed) is embedding


def test_adapted_linear_layers_are_known_by_their_attributes():
    model = adapted("one")
    assert [name for name, module in model.named_modules() if is_adapted_linear(module)] == ["up", "down"]
    assert (model.up.in_features, model.up.out_features) == (4, 8)


def test_importing_the_module_does_not_import_peft():
    code = "import sys, rankwise.compat.peft; print('peft' in sys.modules, 'torch' in sys.modules)"
    python = str(Path(sys.prefix, "bin", "python"))
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("settings", "plain"),
    [({}, True), ({"use_rslora": True}, True), ({"use_dora": True}, False), ({"lora_bias": True}, False)],
)
def test_plain_lora_is_told_from_variants_and_biases(settings, plain):
    layer = adapted("one", **settings).up
    assert is_plain_lora(layer, "one") is plain
    if settings.get("use_dora"):
        layer.lora_magnitude_vector["one"].weight.data *= 2  # DoRA starts as plain LoRA.
    # What plain means: the base's output, and the scaled product of the two matrices.
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    product = layer.lora_B["one"].weight @ layer.lora_A["one"].weight * layer.scaling["one"]
    expected = layer.base_layer(x) + x @ product.t()
    assert torch.allclose(layer(x), expected, atol=1e-5) is plain


def test_an_adapter_that_a_layer_does_not_have_is_no_variant_in_it():
    assert is_plain_lora(adapted("one").up, "two")


def test_after_deactivation_an_adapter_goes_without_another_one_becoming_active():
    model = adapted("one", "two")
    for layer in (model.up, model.down):
        layer.set_adapter("one")
        deactivate_adapters(layer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer.delete_adapter("one")
        assert layer.active_adapters == []
        assert list(layer.lora_A) == ["two"]


def test_without_it_peft_activates_another_one():
    layer = adapted("one", "two").up
    layer.set_adapter("one")
    with pytest.warns(UserWarning, match="Setting active adapter"):
        layer.delete_adapter("one")
    assert layer.active_adapters == ["two"]


def test_inside_the_block_one_adapter_runs_and_no_gradient_switch_is_touched():
    model = adapted("one", "two")
    layers = [model.up, model.down]
    model.requires_grad_(False)
    for layer in layers:
        layer.set_adapter("one")
    model.up.lora_A["two"].weight.requires_grad_(True)
    asking = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    first = model(IDS)
    for layer in layers:
        layer.enable_adapters(False)
        asking_off = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with one_active_adapter(layers, "two"):
        assert [layer.active_adapters for layer in layers] == [["two"], ["two"]]
        assert not any(layer.disable_adapters for layer in layers)
        second = model(IDS)
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == asking_off
    assert not torch.equal(first, second)
    # As before the block: disabled, with the first adapter.
    assert all(layer.disable_adapters for layer in layers)
    assert [layer.active_adapters for layer in layers] == [["one"], ["one"]]
    assert asking != asking_off  # What the public switch does.


def test_what_was_active_comes_back_after_an_error():
    model = adapted("one", "two")
    model.up.set_adapter("one")
    with pytest.raises(KeyError), one_active_adapter([model.up], "two"):
        raise KeyError
    assert model.up.active_adapters == ["one"]


@pytest.mark.parametrize(
    "pattern", [{"up": 5}, {"layers.1.up": 5}, {"layers.[01].up": 5}, {"^model.layers.1.up": 5}, {}]
)
def test_a_pattern_means_what_it_means_to_peft(pattern):
    model = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([Tiny(), Tiny()])})})
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], rank_pattern=pattern, alpha_pattern=pattern)
    inject_adapter_in_model(config, model, "one")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == 4
    assert {name: layer.r["one"] for name, layer in layers.items()} == {
        name: by_pattern(pattern, name, 2) for name in layers
    }
    assert {name: layer.lora_alpha["one"] for name, layer in layers.items()} == {
        name: by_pattern(pattern, name, 3) for name in layers
    }


def test_no_patterns_mean_the_default():
    assert by_pattern(None, "model.up", 7) == 7
