"""The private names of bitsandbytes do what rankwise relies on."""

import logging

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu

from rankwise.compat import bitsandbytes as compat


def layer_4bit(double_quant=True):
    """A `Linear4bit`, 64 to 128 features, quantized."""
    layer = bnb.nn.Linear4bit(
        64, 128, bias=False, compute_dtype=torch.float32, compress_statistics=double_quant, quant_type="nf4"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(layer.weight.data)
    return layer.to("cpu").eval()


def layer_8bit():
    """A `Linear8bitLt`, 64 to 32 features, quantized."""
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.nn.init.normal_(layer.weight.data)
    return layer.to("cpu").eval()


def test_the_native_library_is_named():
    # Of a CPU build; `ErrorHandlerMockBNBNativeLibrary` stands for one that could not be loaded.
    assert compat.native_library().endswith("BNBNativeLibrary")
    assert "Mock" not in compat.native_library()


def test_a_layer_whose_repacking_is_disabled_keeps_its_weight_in_evaluation_mode(monkeypatch):
    def refuse(*args):
        raise AssertionError("repacked")

    monkeypatch.setattr(bnb.nn.modules, "_convert_weight_packed_for_cpu", refuse)
    layer = layer_4bit()
    # As on a CPU that has the instructions.
    layer.support_avx512bf16_for_cpu = True
    assert compat.repacks_on_cpu(layer)
    with torch.no_grad(), pytest.raises(AssertionError, match="repacked"):
        layer(torch.ones(1, 64))
    compat.disable_cpu_repacking(layer)
    assert not compat.repacks_on_cpu(layer)
    with torch.no_grad():
        layer(torch.ones(1, 64))


def test_a_new_layer_says_whether_this_cpu_has_the_instructions():
    assert compat.repacks_on_cpu(layer_4bit()) == bnb.functional.has_avx512bf16()


def test_a_repacked_weight_is_known():
    layer = layer_4bit()
    assert not compat.is_repacked(layer)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    assert compat.is_repacked(layer)


def sizes_of(layer):
    return sorted(
        (str(tensor.dtype).removeprefix("torch."), tensor.numel())
        for tensor in compat.quantization_tensors(layer.weight)
    )


def test_the_tensors_of_a_quantization_are_all_there():
    blocks = 64 * 128 // 64
    single, double = sizes_of(layer_4bit(False)), sizes_of(layer_4bit(True))
    assert single == sorted([("float32", blocks), ("float32", 16)])
    # Scales in 8 bit with their own scale, table and offset.
    assert double == sorted([("uint8", blocks), ("float32", 16), ("float32", 1), ("float32", 256), ("float32", 1)])
    # What makes the weight whole again is all that `state_dict` stores beside it, but for a few bytes of settings.
    stored = {key.rpartition(".")[2] for key in layer_4bit(True).state_dict()} - {"weight"}
    assert stored == {"absmax", "quant_map", "nested_absmax", "nested_quant_map", "bitsandbytes__nf4"}


def test_8_bit_weights_have_their_scales_and_others_nothing():
    assert sizes_of(layer_8bit()) == [("float32", 32)]  # Before its first forward, which moves them to the layer.
    assert sizes_of(torch.nn.Linear(2, 2)) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_through_an_8_bit_layer_is_by_the_dequantized_weight(training):
    layer = layer_8bit().train(training)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).half().float().requires_grad_()
    grad = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    layer(x).backward(grad)
    weight = compat.dequantized_8bit(layer, torch.float32)
    assert weight.shape == (32, 64)
    assert torch.equal(x.grad, grad @ weight)
    # A copy: the layer's own weight stays.
    weight.zero_()
    assert compat.dequantized_8bit(layer, torch.float32).abs().sum() > 0


def test_casts_of_8_bit_layers_are_logged_once(caplog, monkeypatch):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    monkeypatch.setattr(logger, "filters", [])
    layer, x = layer_8bit(), torch.ones(1, 64)
    layer(x)
    layer(x)
    assert len(caplog.records) == 2, "bitsandbytes logs it in another way, or under another name"
    caplog.clear()
    monkeypatch.setattr(compat._once, "_seen", False)
    compat.log_casts_once()
    compat.log_casts_once()
    layer(x)
    layer(x)
    assert [record.getMessage() for record in caplog.records] == [
        "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization"
    ]
