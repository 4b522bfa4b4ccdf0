"""Dequantized weights change the time, and not a bit of the results."""

import pytest
import torch
from helpers.bases import resolved, settings_in
from helpers.packs import load_tiny, make_arm
from helpers.tiny import make_base

from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
from rankwise.modeling.lora import lean as dequantized
from rankwise.modeling.lora.lean import KEEP_BELOW, dequantized_bytes, free_memory, is_dequantized, keep_dequantized
from rankwise.modeling.lora.packed import adapter_parameters, create_adapter, delete_adapter, install


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("dequantized")).model


def is_kept(model):
    layers = [
        module
        for module in model.modules()
        if type(module).__name__ == "Linear4bit" and "bitsandbytes" in type(module).__module__
    ]
    assert len(layers) == 14
    return all("forward" in layer.__dict__ for layer in layers)


def forward_and_backward(model):
    ids = torch.arange(4, 20).view(2, 8)
    name = create_adapter(model, make_arm(lora={"target_modules": "all-linear"}))
    try:
        with install(model).adapter(name, 2):
            logits = model(input_ids=ids).logits
            logits.logsumexp(-1).sum().backward()
        return [logits.detach(), *[each.grad for each in adapter_parameters(model, name).values()]]
    finally:
        delete_adapter(model, name)


def test_logits_and_gradients_are_the_same_to_the_bit(model):
    before = forward_and_backward(model)
    with keep_dequantized(model) as kept:
        assert kept
        inside = forward_and_backward(model)
    after = forward_and_backward(model)
    for one, two, three in zip(before, inside, after, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("module_dtype", ["float32", "bfloat16", "float16"])
def test_logits_are_the_same_to_the_bit_whatever_dtype_a_base_was_loaded_in(
    tmp_path, path, compute_dtype, module_dtype
):
    base = load_base(
        resolved(path),
        QuantizationSpec(bnb_4bit_compute_dtype=compute_dtype),
        settings_in(tmp_path),
        device="cpu",
        module_dtype=module_dtype,
    )
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        expected = base.model(input_ids=ids).logits
        for share in (1.0, 0.0):
            with keep_dequantized(base.model, memory_share=share) as kept:
                assert kept == (share > 0)
                assert torch.equal(base.model(input_ids=ids).logits, expected)


def test_blocks_can_be_nested_and_the_outermost_ends_it(model):
    with keep_dequantized(model):
        with keep_dequantized(model) as kept:
            assert kept
        assert is_kept(model)
    assert not is_kept(model)


def test_with_too_little_memory_nothing_is_kept(model, caplog, monkeypatch):
    monkeypatch.setattr(dequantized, "free_memory", lambda: 1 << 20)
    with caplog.at_level("INFO"), keep_dequantized(model, memory_share=0.001) as kept:
        assert not kept
        assert not is_dequantized(model)
    assert "dequantized in each pass: keeping them would take" in caplog.text


def test_a_model_without_4_bit_layers_is_left_alone(tmp_path):
    plain = load_tiny(tmp_path, quantization={"load_in_4bit": False}).model
    with keep_dequantized(plain) as kept:
        assert not kept


def test_an_error_inside_gives_the_layers_back(model):
    with pytest.raises(KeyError), keep_dequantized(model):
        raise KeyError
    assert not is_kept(model)


@pytest.mark.parametrize(("limit", "expected"), [("max\n", None), ("1048576\n", 1048576 - 1000)])
def test_a_control_groups_limit_counts(tmp_path, monkeypatch, limit, expected):
    (tmp_path / "memory.max").write_text(limit)
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(dequantized, "_CGROUP", tmp_path)
    assert free_memory() == expected if expected is not None else free_memory() > 1 << 20


@pytest.mark.parametrize("bias", [False, True])
def test_dequantizing_in_passing_changes_no_bit_either(tmp_path, bias, caplog):
    model = load_tiny(tmp_path).model
    if bias:
        for n, module in enumerate(module for module in model.modules() if type(module).__name__ == "Linear4bit"):
            module.bias = torch.nn.Parameter(torch.linspace(-1, n, module.out_features), requires_grad=False)
    with keep_dequantized(model):
        before = forward_and_backward(model)
    with caplog.at_level("INFO"), keep_dequantized(model, tokens=KEEP_BELOW) as kept:
        assert not kept
        with keep_dequantized(model) as inner:
            assert not inner
        inside = forward_and_backward(model)
    assert f"gains little with {KEEP_BELOW} tokens a pass" in caplog.text
    assert not is_kept(model)
    for one, two in zip(before, inside, strict=True):
        assert torch.equal(one, two)


def test_what_is_dequantized_at_a_time_is_counted(model):
    sizes = [4 * layer.in_features * layer.out_features for layer in dequantized._layers(model)]
    assert dequantized_bytes(model, tokens=KEEP_BELOW - 1) == sum(sizes)
    assert dequantized_bytes(model, tokens=KEEP_BELOW) == max(sizes)
    with keep_dequantized(model):
        assert dequantized_bytes(model, tokens=KEEP_BELOW) == sum(sizes)
