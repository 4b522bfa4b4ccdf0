"""Logits at chosen positions are those of the model's own forward."""

import logging

import pytest
import torch
from helpers.packs import load_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise.compat.transformers import attention_by_rows
from rankwise.modeling.lora.logits import PACKING, SupervisedLogits


def chosen(model, logits):
    ids = torch.randint(4, 300, (3, 6), generator=torch.Generator().manual_seed(0))
    rows, positions = torch.tensor([0, 0, 1, 2]), torch.tensor([2, 5, 0, 3])
    with torch.no_grad():
        return logits(ids, torch.ones_like(ids), rows, positions), model(input_ids=ids).logits[rows, positions]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_the_head_runs_on_the_chosen_positions_alone(tmp_path, architecture):
    model = load_tiny(tmp_path, architecture).model
    logits = SupervisedLogits(model)
    assert logits.direct
    mine, own = chosen(model, logits)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-5)


def test_a_base_that_changes_logits_after_the_head_is_noticed(tmp_path, caplog):
    model = load_tiny(tmp_path).model
    own = type(model).forward

    def capped(self, *args, **kwargs):
        output = own(self, *args, **kwargs)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    model.forward = capped.__get__(model)
    with caplog.at_level(logging.INFO):
        logits = SupervisedLogits(model)
    assert not logits.direct
    assert "all logits are computed" in caplog.text
    assert "own forward differs by up to" in caplog.text
    mine, theirs = chosen(model, logits)
    torch.testing.assert_close(mine, theirs)


def test_a_known_setting_in_the_configuration_is_enough(tmp_path, caplog):
    model = load_tiny(tmp_path).model
    model.config.final_logit_softcapping = 30.0
    with caplog.at_level(logging.INFO):
        assert not SupervisedLogits(model).direct
    assert "final_logit_softcapping" in caplog.text


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_padding_on_the_right_needs_no_mask_under_causal_attention(tmp_path, architecture):
    model = load_tiny(tmp_path, architecture).model
    logits = SupervisedLogits(model)
    assert not logits.masked
    ids = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    rows, positions = torch.tensor([0, 0, 1]), torch.tensor([1, 4, 8])
    with torch.no_grad():
        mine = logits(ids, mask, rows, positions)
        own = model(input_ids=ids, attention_mask=mask).logits[rows, positions]
    torch.testing.assert_close(mine, own, rtol=1e-5, atol=1e-5)


def test_a_base_whose_tokens_see_padding_gets_its_mask(tmp_path, caplog):
    model = load_tiny(tmp_path).model
    attention = [layer.self_attn for layer in model.model.layers]
    for layer in attention:
        own = layer.forward

        def looks_ahead(hidden_states, *args, _own=own, attention_mask=None, **kwargs):
            output, weights = _own(hidden_states, *args, attention_mask=attention_mask, **kwargs)
            unmasked = attention_mask is None
            return output + hidden_states.mean(dim=1, keepdim=True) * unmasked, weights

        layer.forward = looks_ahead
    with caplog.at_level(logging.INFO):
        logits = SupervisedLogits(model)
    assert logits.masked
    assert "padding is masked, since its tokens differ by up to" in caplog.text
    seen = []
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    ids = torch.randint(4, 300, (1, 6))
    logits(ids, torch.ones_like(ids), torch.tensor([0]), torch.tensor([2]))
    assert "attention_mask" in seen[0]


def configuration(kind):
    """A tiny configuration of an architecture whose layers have windows where it knows them."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0}
    if kind in {"gemma2", "gemma3_text"}:
        sizes |= {"head_dim": 8, "sliding_window": 5}
    elif kind in {"mistral", "phi3"}:
        sizes |= {"sliding_window": 5}
    elif kind in {"qwen3", "smollm3"}:
        sizes |= {"head_dim": 8}
    return AutoConfig.for_model(kind, **sizes)


# Gemma 2 caps scores, for which transformers has eager attention only.
WAYS = [(kind, way) for kind in sorted(PACKING) for way in ("sdpa", "eager") if (kind, way) != ("gemma2", "sdpa")]


@pytest.mark.parametrize(("kind", "attention"), [*WAYS, *((kind, "rows") for kind, way in WAYS if way == "sdpa")])
def test_listed_architectures_keep_rows_of_a_shared_sequence_apart(kind, attention):
    torch.manual_seed(0)
    by_rows = attention == "rows"
    attention = "sdpa" if by_rows else attention
    model = AutoModelForCausalLM.from_config(configuration(kind), attn_implementation=attention).eval()
    model.requires_grad_(False)
    logits = SupervisedLogits(model)
    assert logits.packs
    embedding = model.get_input_embeddings().weight.requires_grad_()
    lengths = (9, 4, 11)
    ids = torch.randint(1, 64, (1, sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    sequences = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])[None]
    at = torch.tensor([3, 7, 9, 11, 13, 20, 22])
    arguments = (ids, None, torch.zeros_like(at), at, ids[0, at + 1], positions)
    with attention_by_rows(lambda: [lengths] if by_rows else None):
        together = logits.losses(*arguments, None if by_rows else sequences)
        (mine,) = torch.autograd.grad(together.sum(), embedding)
    alone, start = [], 0
    for length in lengths:
        own = at[(at >= start) & (at < start + length)] - start
        row = ids[:, start : start + length]
        alone.append(logits.losses(row, torch.ones_like(row), torch.zeros_like(own), own, row[0, own + 1]))
        start += length
    apart = torch.cat(alone)
    (theirs,) = torch.autograd.grad(apart.sum(), embedding)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
