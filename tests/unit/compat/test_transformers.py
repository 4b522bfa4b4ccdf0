"""The private names of transformers do what rankwise relies on."""

from collections import Counter

import pytest
import torch
from helpers.gguf_file import make_gguf
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, CacheLayerMixin, GPT2Config, LlamaConfig
from transformers.utils import logging as transformers_logging

from rankwise.compat.transformers import (
    attention_of,
    checkpointable_layers,
    gguf_progress,
    is_conv1d,
    known_packing,
    note_injected_adapter,
)
from rankwise.modeling.decoding.slot_cache import SlotCache


def llama(**options):
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, **options).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_that_runs_is_known(attention, monkeypatch):
    model = llama(attn_implementation=attention)
    assert attention_of(model.config) == attention
    own, calls = torch.nn.functional.scaled_dot_product_attention, []

    def count(*arguments, **options):
        calls.append(arguments)
        return own(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert bool(calls) == (attention == "sdpa")


def test_the_attention_is_known_after_a_change():
    model = llama(attn_implementation="sdpa")
    model.set_attn_implementation("eager")
    assert attention_of(model.config) == "eager"


def test_a_model_that_is_told_of_an_injected_adapter_can_switch_it_off(monkeypatch):
    # transformers 5.24 asks for peft 0.22 before it looks.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = llama()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model, "one")
    with pytest.raises(ValueError, match="No adapter loaded"):
        model.disable_adapters()
    note_injected_adapter(model)
    tokens = torch.tensor([[1, 2, 3]])
    adapted = model(input_ids=tokens).logits
    model.disable_adapters()
    assert not torch.equal(adapted, model(input_ids=tokens).logits)


def test_other_modules_are_not_told():
    module = torch.nn.Linear(2, 2)
    note_injected_adapter(module)
    assert not hasattr(module, "_hf_peft_config_loaded")


def test_gpt_2_s_linear_layers_are_known_and_have_inputs_first():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    block = AutoModelForCausalLM.from_config(config).transformer.h[0]
    assert is_conv1d(block.attn.c_attn)
    assert tuple(block.attn.c_attn.weight.shape) == (16, 48)
    assert not isinstance(block.attn.c_attn, torch.nn.Linear)
    assert not is_conv1d(torch.nn.Linear(2, 2))
    assert not is_conv1d(torch.nn.Conv1d(2, 2, 1))


def test_the_layers_to_checkpoint_are_those_of_the_decoder():
    model = llama()
    assert checkpointable_layers(model) == list(model.model.layers)
    assert checkpointable_layers(torch.nn.Sequential(torch.nn.Linear(2, 2))) == []


def test_those_are_the_layers_that_transformers_itself_runs_again():
    model = llama().train()
    model.activation_checkpointing_enable()
    runs = Counter()
    for module in [model.lm_head, *(layer.mlp for layer in checkpointable_layers(model))]:
        # Before it runs: the second run ends early, once it has what the backward pass needs.
        module.register_forward_pre_hook(lambda module, *_: runs.update([module]))
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert runs == {model.lm_head: 1, model.model.layers[0].mlp: 2, model.model.layers[1].mlp: 2}


def test_a_layer_of_the_slot_cache_has_all_that_a_cache_layer_needs():
    (layer,) = SlotCache(2, 1).layers
    assert isinstance(layer, CacheLayerMixin)
    wanted = set(CacheLayerMixin.__abstractmethods__)
    assert wanted <= set(vars(type(layer)))


def test_the_bar_over_a_gguf_file_s_tensors_is_replaced(tmp_path, capfd):
    file = make_gguf(tmp_path / "tiny.gguf", layers=1)
    names = []

    def wrap(tensors):
        for tensor in tensors:
            names.append(tensor.name)
            yield tensor

    transformers_logging.disable_progress_bar()
    try:
        with gguf_progress(wrap):
            AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, local_files_only=True)
        assert "token_embd.weight" in names
        assert len(names) == 12
        assert "Converting and de-quantizing" not in capfd.readouterr().err
        # Afterwards transformers draws its own again.
        AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, local_files_only=True)
        assert "Converting and de-quantizing" in capfd.readouterr().err
    finally:
        transformers_logging.enable_progress_bar()


def test_which_tokens_belong_together_can_be_said():
    """Told nothing, rows are whole sequences even where positions restart; told, they are taken apart."""
    torch.manual_seed(0)
    model = llama()
    ids = torch.arange(4, 12)[None]
    restarting = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        alone = model(input_ids=ids[:, 3:], use_cache=False).logits
        found = model(input_ids=ids, position_ids=restarting, use_cache=False).logits
        with known_packing(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])):
            said = model(input_ids=ids, position_ids=restarting, use_cache=False).logits
        with known_packing(None):
            whole = model(input_ids=ids, position_ids=restarting, use_cache=False).logits
    assert torch.equal(found, said)
    torch.testing.assert_close(said[:, 3:], alone, rtol=1e-4, atol=1e-5)
    assert (whole[:, 3:] - alone).abs().max() > 1e-3
