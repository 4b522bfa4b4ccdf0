from __future__ import annotations

import copy
import pickle

import pytest
from helpers.definitions import COMMIT, parse
from pydantic import ValidationError

from rankwise.experiment.schema import (
    DatasetSpec,
    EvalSplit,
    ExperimentSpec,
    LoraSpec,
    QuantizationSpec,
    Section,
    TrainingSpec,
)


def lora(**changes):
    return LoraSpec(**{"r": 8, "lora_alpha": 16, "target_modules": ("q_proj",), **changes})


def sections() -> list[type[Section]]:
    def below(cls):
        return [cls, *(deeper for child in cls.__subclasses__() for deeper in below(child))]

    return below(Section)[1:]


def test_every_section_is_immutable_strict_and_refuses_unknown_keys():
    for section in sections():
        assert section.model_config["frozen"], section
        assert section.model_config["strict"], section
        assert section.model_config["extra"] == "forbid", section
    with pytest.raises(ValidationError, match="frozen"):
        lora().r = 4


def test_every_field_says_what_it_is():
    for section in sections():
        if section.__module__ == "rankwise.experiment.schema":
            assert [name for name, field in section.model_fields.items() if not field.description] == [], section


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0}, {"r": -1}, {"r": True}, {"r": 8.0}, {"r": "8"}, {"lora_alpha": 0}, {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")}, {"lora_alpha": True}, {"lora_dropout": 1.0}, {"lora_dropout": -0.1},
        {"target_modules": ()}, {"target_modules": "q_proj"}, {"target_modules": [1]}, {"target_modules": [""]},
        {"target_modules": None}, {"use_rslora": 1}, {"rank": 8},
    ],
)  # fmt: skip
def test_values_out_of_range_or_of_another_type_are_refused(changes):
    with pytest.raises(ValidationError):
        lora(**changes)


def test_target_modules_have_no_order_and_no_doubles():
    assert lora(target_modules=["v", "q", "v"]).target_modules == ("q", "v")
    assert lora(target_modules="all-linear").target_modules == "all-linear"


def test_whole_numbers_have_one_spelling():
    assert isinstance(lora(lora_alpha=16.0).lora_alpha, int)
    assert lora(lora_alpha=16.0) == lora(lora_alpha=16)
    assert lora(lora_alpha=1.5).lora_alpha == 1.5


def test_sections_left_out_take_the_documented_defaults():
    experiment = parse()
    assert experiment.spec.quantization == QuantizationSpec(
        load_in_4bit=True,
        load_in_8bit=False,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="auto",
    )
    assert (
        experiment.spec.sweep.method,
        experiment.spec.seed,
        experiment.spec.tracking.log_examples,
        experiment.spec.init_from,
    ) == ("grid", 0, True, None)
    training = parse().spec.training
    assert (training.save_steps, training.logging_steps, training.eval_steps, training.max_grad_norm) == (
        100,
        1,
        None,
        1,
    )


def test_register_is_a_plain_attribute_although_its_name_is_taken_by_abcmeta():
    assert parse().spec.register.name == "pricer"
    assert parse(("register:\n  name: pricer\n  alias: best\n", "")).spec.register is None


@pytest.mark.parametrize(
    ("training", "rows", "steps"),
    [
        ({"max_steps": 7}, 100, 7),
        ({"num_train_epochs": 1}, 100, 13),
        ({"num_train_epochs": 2}, 100, 26),
        ({"num_train_epochs": 0.5}, 100, 7),
        ({"num_train_epochs": 1.5}, 100, 20),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 4}, 100, 4),
        ({"num_train_epochs": 1.5, "gradient_accumulation_steps": 2}, 10, 2),
        ({"num_train_epochs": 3}, 5, 3),
        ({"num_train_epochs": 0.001}, 5, 1),
    ],
)
def test_steps_come_from_max_steps_or_from_epochs_that_end_with_a_step(training, rows, steps):
    assert TrainingSpec(**training).optimizer_steps(rows) == steps


def test_epochs_follow_one_another_without_a_gap_with_rendering_1():
    two = TrainingSpec(num_train_epochs=2)
    assert [two.optimizer_steps(100, whole_epochs=whole) for whole in (False, True)] == [25, 26]


@pytest.mark.parametrize(("warmup", "steps", "expected"), [(0, 100, 0), (5, 100, 5), (0.1, 100, 10), (0.03, 50, 2)])
def test_warm_up_is_a_count_or_a_share_rounded_up(warmup, steps, expected):
    assert TrainingSpec(max_steps=steps, warmup_steps=warmup).warmup(steps) == expected


def test_a_share_of_warm_up_must_be_below_one():
    with pytest.raises(ValidationError):
        TrainingSpec(max_steps=3, warmup_steps=1.5)


def test_eval_is_a_source_or_a_split():
    assert DatasetSpec(train="a/b", eval="a/c").eval == "a/c"
    assert DatasetSpec(train="a/b", eval={"rows": 3}).eval == EvalSplit(split_from="train", rows=3, seed=0)


def test_pins_are_filled_in_and_expressions_stay():
    experiment = parse((f"base_model_revision: {COMMIT}\n", ""))
    assert experiment.spec.base_model_revision is None
    pinned = experiment.with_pins(base_model_revision=COMMIT, train_revision="1" * 40)
    assert (pinned.spec.base_model_revision, pinned.spec.dataset.train_revision) == (COMMIT, "1" * 40)
    assert pinned.spec.dataset.eval_revision is None
    assert pinned.expressions == {"lora.lora_alpha": "2*r"}
    assert experiment.spec.base_model_revision is None
    assert pinned.with_pins() == pinned


def test_a_definition_can_be_copied_and_sent_to_another_process():
    experiment = parse()
    assert copy.deepcopy(experiment) == experiment
    again = pickle.loads(pickle.dumps(experiment))
    assert again == experiment
    assert again.expressions == experiment.expressions


def test_the_document_has_defaults_and_expressions():
    document = parse().document
    assert document["lora"]["lora_alpha"] == "2*r"
    assert document["training"]["gradient_accumulation_steps"] == 1
    assert document["register"] == {"name": "pricer", "alias": "best", "checkpoint": "last"}
    assert set(document) == {field.alias or name for name, field in ExperimentSpec.model_fields.items()}
