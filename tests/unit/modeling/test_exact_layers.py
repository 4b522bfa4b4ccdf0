"""A 4-bit base stays what was loaded, on CPUs for which bitsandbytes would repack it too."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers.packs import load_tiny

from rankwise.modeling.base import hold_exact, is_repacked


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("exact"))


def test_layers_of_a_loaded_base_have_no_kernel_that_repacks(base):
    layers = [module for module in base.model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_a_forward_in_evaluation_mode_changes_no_bit_of_the_base(base):
    def state():
        return {name: value.clone() for name, value in base.model.state_dict().items()}

    before = state()
    assert not base.model.training
    base.model(input_ids=torch.arange(4, 20).view(2, 8))
    assert not is_repacked(base.model)
    after = state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_computes_in_its_compute_dtype(base):
    layer = base.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float32)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight))


def test_other_models_have_nothing_to_hold():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert hold_exact(model) == 0
    assert not is_repacked(model)


def test_a_repacked_layer_is_found(base):
    state = base.model.model.layers[1].mlp.down_proj.weight.quant_state
    state.packing_format_for_cpu = True
    try:
        assert is_repacked(base.model)
    finally:
        state.packing_format_for_cpu = False
