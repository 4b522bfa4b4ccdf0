import pytest
import torch

from rankwise.modeling.base import model_bytes, quantized_linear_bytes


def test_shared_parameters_are_counted_once():
    one = torch.nn.Linear(4, 8, bias=False)
    other = torch.nn.Linear(4, 8, bias=False)
    other.weight = one.weight
    assert model_bytes(torch.nn.ModuleList([one, other])) == 4 * 32


def test_buffers_count_in_their_own_dtype():
    module = torch.nn.Linear(4, 8)
    module.register_buffer("table", torch.zeros(3, dtype=torch.float16))
    assert model_bytes(module) == 4 * (32 + 8) + 6


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (64, 48), (576, 192), (100, 7), (1024, 512)])
def test_the_formula_of_a_quantized_layer_is_what_bitsandbytes_takes(inputs, outputs, double_quant):
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.float32, compress_statistics=double_quant, quant_type="nf4"
    )
    layer.to("cpu")
    expected = quantized_linear_bytes(inputs * outputs, bits=4, double_quant=double_quant, out_features=outputs)
    assert model_bytes(layer) == expected
