"""Linear layers that are called with other shapes than (rows, tokens, features)."""

import pytest
import torch
from helpers.adapted import load_tiny
from helpers.matrix import Subject, alone, peft_loop, predict
from torch import nn

from rankwise.exceptions import ConfigError
from rankwise.modeling.lora.packed import create_adapter, install
from rankwise.modeling.lora.row_shape import BatchShape, RowForm, batch_shape


def shape(rows, tokens):
    batch = BatchShape()
    batch.rows, batch.tokens = rows, tokens
    return batch


@pytest.mark.parametrize(
    ("form", "row_first"),
    [
        ((2, 3, 5), lambda x: x),
        ((6, 5), lambda x: x.view(2, 3, 5)),
        ((1, 6, 5), lambda x: x.view(2, 3, 5)),
        ((2, 3, 4, 5), lambda x: x.view(2, 12, 5)),
        ((2, 4, 3, 5), lambda x: x.transpose(1, 2).reshape(2, 12, 5)),
        ((2, 1, 3, 5), lambda x: x.view(2, 3, 5)),
    ],
)
def test_every_form_becomes_rows_and_comes_back(form, row_first):
    x = torch.arange(float(torch.tensor(form).prod())).view(form)
    seen = RowForm(x, shape(2, 3), "fc1")
    entered = seen.enter(x)
    assert torch.equal(entered, row_first(x))
    assert torch.equal(seen.leave(entered), x)
    assert seen.rows == 2
    assert seen.inputs_per_token == entered.shape[1] // 3


@pytest.mark.parametrize(
    ("form", "batch", "module"),
    [
        ((4, 5), shape(2, 3), "fc1"),
        ((6, 5), shape(2, 3), "mlp.experts.0.fc1"),
        ((6, 5), shape(0, 0), "fc1"),
        ((3, 3, 5), shape(2, 3), "fc1"),
        ((2, 4, 5, 5), shape(2, 3), "fc1"),
    ],
)
def test_rows_that_cannot_be_told_apart_are_refused(form, batch, module):
    with pytest.raises(
        ConfigError, match=f"module {module} is called with an input of shape .*cannot be distinguished"
    ):
        RowForm(torch.zeros(form), batch, module)


def test_the_shape_of_a_batch_is_that_of_the_last_one(tmp_path):
    model = load_tiny(tmp_path).model
    assert batch_shape(model) is batch_shape(model)
    for form in ((2, 7), (3, 4)):
        model(input_ids=torch.zeros(form, dtype=torch.int64))
        assert (batch_shape(model).rows, batch_shape(model).tokens) == form


@pytest.mark.parametrize("name", ["opt", "minicpm3"])
def test_flattened_and_four_dimensional_inputs_train_as_plain_peft_does(name, tmp_path):
    torch.set_num_threads(1)
    subject = Subject(name, tmp_path)
    peft_loop(subject)
    alone(subject)
    predict(subject)


@pytest.mark.parametrize("name", ["opt", "minicpm3"])
def test_dropout_of_such_layers_is_the_same_alone_and_in_a_pack(name, tmp_path):
    torch.set_num_threads(1)
    subject = Subject(name, tmp_path)
    plain = subject.packed[1].losses(subject.arms[0].spec_hash)
    with_dropout = Subject(name, tmp_path / "dropout")
    with_dropout.arms = [
        arm.model_copy(
            update={
                "lora": arm.lora.model_copy(update={"lora_dropout": 0.1 * (1 + index)}),
                "training": arm.training.model_copy(update={"gradient_checkpointing": name == "opt"}),
            }
        )
        for index, arm in enumerate(subject.arms)
    ]
    alone(with_dropout)
    assert with_dropout.packed[1].losses(with_dropout.arms[0].spec_hash)[-1] != pytest.approx(plain[-1], rel=1e-6)


@pytest.mark.parametrize(("name", "shared"), [("qwen3_next", "shared_expert"), ("deepseek_v3", "shared_experts")])
def test_shared_experts_have_adapters_and_routed_ones_have_not(name, shared, tmp_path):
    torch.set_num_threads(1)
    subject = Subject(name, tmp_path)
    peft_loop(subject)
    names = set(subject.weights(0))
    assert {part for part in ("gate_proj", "up_proj", "down_proj") if any(f"{shared}.{part}." in n for n in names)} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert not [name for name in names if ".experts." in name]


def test_an_adapter_on_experts_is_refused_before_anything_is_trained(tmp_path):
    from peft import LoraConfig, inject_adapter_in_model

    subject = Subject("qwen3_moe", tmp_path)
    model = subject.base.model
    inject_adapter_in_model(LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"]), model, "experts")
    with pytest.raises(ConfigError, match=r"adapter on a parameter \(target_parameters: the experts of a mixture\)"):
        install(model)


def test_all_linear_leaves_routers_alone(tmp_path):
    subject = Subject("phimoe", tmp_path)
    model = subject.base.model
    arm = subject.arms[0].model_copy(
        update={"lora": subject.arms[0].lora.model_copy(update={"target_modules": "all-linear"})}
    )
    create_adapter(model, arm)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapted
    assert not [name for name in adapted if "router" in name]
    assert [name for name, module in model.named_modules() if "router" in name and isinstance(module, nn.Linear)]
