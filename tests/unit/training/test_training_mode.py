"""The state of the model while it trains."""

import weakref

import pytest
import torch
from helpers.packs import load_tiny, make_arm
from torch import nn

from rankwise.exceptions import ConfigError
from rankwise.modeling.lora.draws import DropoutKey
from rankwise.modeling.lora.function import Group
from rankwise.modeling.lora.packed import Segment, create_adapter, delete_adapter, dropout_words, install
from rankwise.modeling.lora.stacks import Stacks
from rankwise.training.loop import training_mode


def test_only_quantized_layers_are_in_training_mode_and_come_back(base):
    with training_mode(base.model, gradient_checkpointing=True):
        training = {type(module).__name__ for module in base.model.modules() if module.training}
        assert training == {"Linear4bit"}
        assert all("forward" in layer.__dict__ for layer in base.model.model.layers)
    assert not any(module.training for module in base.model.modules())
    assert not any("forward" in layer.__dict__ for layer in base.model.model.layers)


def test_checkpointed_blocks_are_run_again_in_backward_and_not_without_gradients(base):
    calls = []
    layer = base.model.model.layers[1]
    hook = layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.randint(4, 300, (2, 5))
    try:
        with training_mode(base.model, gradient_checkpointing=True):
            embedded = base.model.model.embed_tokens(ids).requires_grad_()
            loss = base.model(inputs_embeds=embedded, use_cache=False).logits.sum()
            assert len(calls) == 1
            loss.backward()
            assert len(calls) == 2
            with torch.no_grad():
                base.model(input_ids=ids)
            assert len(calls) == 3
    finally:
        hook.remove()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_masks_wait_for_the_backward_pass_without_checkpointing_only(base, monkeypatch, checkpointing):
    made = []
    own = Group.mask

    def mask(group, x, module):
        drawn = own(group, x, module)
        made.append(weakref.ref(drawn))
        return drawn

    monkeypatch.setattr(Group, "mask", mask)
    arm = make_arm(lora={"lora_dropout": 0.5})
    name = create_adapter(base.model, arm)
    segment = Segment(adapter=name, start=0, stop=2, dropout=DropoutKey(seed=0, step=0, micro_step=0), length=8)
    routing = install(base.model)
    routing.stacks = Stacks(base.model, {name: False}, torch.float32)
    try:
        with (
            training_mode(base.model, gradient_checkpointing=checkpointing),
            routing.segments([segment], dropout_words([segment])),
        ):
            loss = base.model(input_ids=torch.arange(4, 20).view(2, 8), use_cache=False).logits.sum()
            assert len(made) == 4
            assert sum(each() is not None for each in made) == (0 if checkpointing else 4)
            loss.backward()
    finally:
        routing.stacks = None
        delete_adapter(base.model, name)


def test_an_architecture_without_blocks_is_refused():
    with (
        pytest.raises(ConfigError, match="gradient_checkpointing: Linear has no blocks"),
        training_mode(nn.Linear(2, 2), gradient_checkpointing=True),
    ):
        pass


def test_an_architecture_without_blocks_is_trained_without_checkpointing():
    with training_mode(nn.Linear(2, 2), gradient_checkpointing=False):
        pass


def test_the_bases_own_dropout_stays_off(tmp_path, caplog):
    model = load_tiny(tmp_path, "gpt_neox").model
    model.gpt_neox.emb_dropout.p = 0.5
    ids = torch.randint(4, 300, (2, 5))
    with caplog.at_level("INFO"), torch.no_grad(), training_mode(model, gradient_checkpointing=False):
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert "the base's own dropout is off" in caplog.text
