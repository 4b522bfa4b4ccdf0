import pytest
import torch
from helpers.packs import load_tiny, make_arm

from rankwise.modeling.lora.packed import create_adapter, delete_adapter
from rankwise.tasks.base_holder import pack_residue, sample_digest


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("clean")).model


def test_a_base_is_clean_before_a_pack_and_after_it(model):
    before = sample_digest(model)
    assert pack_residue(model) == []
    name = create_adapter(model, make_arm())
    found = pack_residue(model)
    assert found[0] == f"adapters {name}"
    assert "parameters that require gradients" in found[1]
    delete_adapter(model, name)
    assert pack_residue(model) == []
    assert sample_digest(model) == before, "an adapter is no part of the base"


def test_a_gradient_and_the_mode_are_noticed(model):
    parameter = model.get_input_embeddings().weight
    parameter.grad = torch.zeros_like(parameter)
    model.train()
    assert pack_residue(model) == ["1 gradients, the first is of model.embed_tokens.weight", "training mode"]
    parameter.grad = None
    model.eval()


def test_weights_that_were_changed_are_noticed(model):
    before = sample_digest(model)
    weight = model.model.norm.weight
    with torch.no_grad():
        weight[0] += 1
        assert sample_digest(model) != before
        weight[0] -= 1
    assert sample_digest(model) == before
