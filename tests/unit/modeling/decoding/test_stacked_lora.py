"""The stack of all adapters against the slices of the packed forward, one token a row."""

from __future__ import annotations

import pytest
import torch
from helpers.adapted import load_tiny
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from rankwise.compat.peft import SEVERAL_ADAPTERS
from rankwise.exceptions import ConfigError
from rankwise.modeling.base import expected_warning
from rankwise.modeling.decoding.stacked_lora import StackedLora, stackable
from rankwise.modeling.lora.packed import install, segments_of

TOKENS = torch.tensor([[5], [9], [9], [17]])
OWNERS = ["b", None, "a", "b"]
# Other modules, ranks and scalings in each.
CONFIGS = {
    "a": LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}),
    "b": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_rslora=True, alpha_pattern={"v_proj": 5}),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_tiny(tmp_path_factory.mktemp("base")).model
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        with expected_warning(SEVERAL_ADAPTERS):
            inject_adapter_in_model(config, model, name)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_B:
                torch.nn.init.normal_(module.lora_B[name].weight, std=0.5)
    model.requires_grad_(False)
    return model.eval()


def run(model):
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits[:, -1]


def test_stacked_adapters_give_what_their_slices_give(model):
    with install(model).segments(segments_of(model, OWNERS)):
        expected = run(model)
    assert len({tuple(row.tolist()) for row in expected}) == 4
    assert stackable(model, ["a", "b"], 1 << 30)
    stack = StackedLora(model, ["a", "b"])
    stack.assign(OWNERS)
    with stack.active():
        torch.testing.assert_close(run(model), expected)
    stack.assign(["a"] * 4)
    with stack.active():
        ours = run(model)
    with install(model).segments(segments_of(model, ["a"] * 4)):
        torch.testing.assert_close(ours, run(model))


def test_rows_of_the_bare_base_get_exactly_it(model):
    with install(model).segments([]):
        base = run(model)
    stack = StackedLora(model, ["a", "b"])
    stack.assign(OWNERS)
    with stack.active():
        assert torch.equal(run(model)[1], base[1])


def test_what_is_not_plain_lora_or_takes_too_much_is_not_stacked(model):
    assert not stackable(model, ["a", "dora"], 1 << 30)
    assert not stackable(model, ["a", "b"], 100)


def test_other_rows_than_were_assigned_are_refused(model):
    stack = StackedLora(model, ["a", "b"])
    stack.assign(OWNERS[:3])
    with (
        stack.active(),
        pytest.raises(ConfigError, match=r"module .*q_proj is called with an input of shape \(4, 1, 64\)"),
    ):
        run(model)
