"""Feed-forwards that keep less give the same, to the bit."""

import pytest
import torch
from helpers.packs import load_tiny, make_arm
from transformers.activations import ACT2FN

from rankwise.modeling.base import linear_modules
from rankwise.modeling.lora.lean import is_lean, keep_dequantized, lean_feed_forwards
from rankwise.modeling.lora.packed import adapter_parameters, create_adapter, delete_adapter, install


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    loaded = load_tiny(tmp_path_factory.mktemp("lean")).model
    # As training has it.
    with keep_dequantized(loaded):
        yield loaded


@pytest.fixture(autouse=True)
def _own_activations(model):
    kept = [layer.mlp.act_fn for layer in model.model.layers]
    yield
    for layer, act in zip(model.model.layers, kept, strict=True):
        layer.mlp.act_fn = act


def forward_and_backward(model, targets):
    """Logits and gradients, and how many bytes were kept between the passes, what is shared counted once."""
    kept: dict[int, int] = {}
    known = {each.untyped_storage().data_ptr() for each in model.parameters()}
    alive = []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    name = create_adapter(model, make_arm(lora={"target_modules": targets}))
    try:
        with install(model).adapter(name, 2), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(input_ids=torch.arange(4, 68).view(2, 32)).logits
            logits.logsumexp(-1).sum().backward()
        gradients = [each.grad for each in adapter_parameters(model, name).values()]
        return [logits.detach(), *gradients], sum(kept.values())
    finally:
        delete_adapter(model, name)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
def test_logits_and_gradients_are_the_same_to_the_bit_and_less_is_kept(model, targets, act):
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN[act]
    before, much = forward_and_backward(model, targets)
    with lean_feed_forwards(model) as count:
        assert count == len(model.model.layers)
        inside, less = forward_and_backward(model, targets)
    for one, two in zip(before, inside, strict=True):
        assert torch.equal(one, two)
    width = model.config.intermediate_size
    assert much - less >= 4 * 64 * width * len(model.model.layers)
    assert not any("forward" in layer.mlp.__dict__ for layer in model.model.layers)


def test_a_feed_forward_that_does_something_else_keeps_its_own_forward(model, monkeypatch, caplog):
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 2)
    with caplog.at_level("INFO"), lean_feed_forwards(model) as count:
        assert count == 0
    assert "keeps its own forward in 2 of 2 modules: the lean one gives something else" in caplog.text


def test_each_module_is_asked_since_layers_of_one_type_may_differ(model, monkeypatch):
    first = model.model.layers[0].mlp
    own = type(first).forward
    monkeypatch.setattr(type(first), "forward", lambda self, x: own(self, x) * (2 if self is first else 1))
    with lean_feed_forwards(model) as count:
        assert count == len(model.model.layers) - 1
        assert "forward" not in first.__dict__


def test_what_shows_with_large_numbers_only_is_seen(model, monkeypatch):
    kind = type(model.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: clamped(self, x))

    def clamped(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x))

    small = torch.linspace(-2, 2, model.config.hidden_size)
    assert model.model.layers[0].mlp.gate_proj(small).max() < 7
    with lean_feed_forwards(model) as count:
        assert count == 0


def test_a_trial_that_fails_leaves_the_module_alone_and_is_told(model, monkeypatch, caplog):
    def fails(self, x):
        raise RuntimeError("not with two tokens")

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", fails)
    with caplog.at_level("INFO"), lean_feed_forwards(model) as count:
        assert count == 0
    layers = len(model.model.layers)
    assert f"in {layers} of {layers} modules: the trial ended with RuntimeError: not with two tokens" in caplog.text


@pytest.mark.parametrize("act", ["linear", "relu"])
def test_an_activation_that_gives_its_input_or_zeros_has_the_same_gradients(model, act):
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN[act]
    before, _ = forward_and_backward(model, "all-linear")
    with lean_feed_forwards(model) as count:
        assert count == len(model.model.layers)
        inside, _ = forward_and_backward(model, "all-linear")
    for one, two in zip(before, inside, strict=True):
        assert torch.equal(one, two)


def test_an_activation_that_works_in_place_is_left_to_the_module(model):
    class Doubled(torch.nn.Module):
        def forward(self, gate):
            return gate.mul_(2)

    for layer in model.model.layers:
        layer.mlp.act_fn = Doubled()
    with lean_feed_forwards(model) as count:
        assert count == 0


def test_a_model_without_gates_is_left_alone(tmp_path):
    neox = load_tiny(tmp_path, "gpt_neox").model
    with lean_feed_forwards(neox) as count:
        assert count == 0
    assert not is_lean(linear_modules(neox))


def test_the_names_of_the_layers_foretell_it(model):
    assert is_lean(linear_modules(model))
