"""8-bit layers that keep nothing give the same, to the bit; what they keep is in `training/test_budget`."""

import bitsandbytes as bnb
import pytest
import torch
from helpers.packs import load_tiny

from rankwise.modeling.lora.lean import lean_8_bit_layers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    quantization = {"load_in_4bit": False, "load_in_8bit": True}
    return load_tiny(tmp_path_factory.mktemp("eight-bit"), "qwen2", quantization).model


@pytest.fixture(params=[True, False], ids=["as in training", "as on a GPU"])
def training(model, request):
    """bitsandbytes rounds inputs to 8 bit too, on GPUs always, on CPUs in evaluation mode."""
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear8bitLt)]
    for layer in layers:
        layer.training = request.param
    yield
    for layer in layers:
        layer.training = False


def forward_and_backward(model):
    embedded = model.get_input_embeddings()(torch.arange(4, 68).view(2, 32)).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), embedded.grad


def test_logits_and_gradients_are_the_same_to_the_bit(model, training):
    expected = forward_and_backward(model)
    with lean_8_bit_layers(model) as count:
        assert count == 14
        found = forward_and_backward(model)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    assert not any(
        "forward" in module.__dict__ for module in model.modules() if type(module).__name__ == "Linear8bitLt"
    )
