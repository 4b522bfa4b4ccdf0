from __future__ import annotations

import copy

import pytest
from helpers.definitions import parse

from rankwise.experiment.rules import FieldView, find_problems
from rankwise.experiment.schema import LrSchedulerSpec


def data():
    return copy.deepcopy(parse().document)


def messages(document, wrong=()):
    return [
        f"{'.'.join(map(str, problem.path))}: {problem.text}" for problem in find_problems(FieldView(document, wrong))
    ]


def test_a_good_definition_has_no_problems():
    document = data()
    document["lora"]["lora_alpha"] = 16
    assert messages(document) == []


def test_every_rule_speaks_although_others_have_something_to_say():
    document = data()
    document["quantization"]["load_in_8bit"] = True
    document["training"]["num_train_epochs"] = 2
    document["dataset"]["completion"] = None
    document["evaluation"]["primary_metric"] = "eval.los"
    document["lora"]["target_modules"] = ["lm_head"]
    assert {message.split(":")[0] for message in messages(document)} == {
        "quantization.load_in_8bit", "training.num_train_epochs", "dataset.completion", "evaluation.primary_metric",
        "lora.target_modules",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", [("training", "max_steps"), ("training",), ("training", "num_train_epochs", 3)])
def test_a_rule_that_needs_a_wrong_field_is_silent(wrong):
    document = data()
    document["training"]["num_train_epochs"] = 2
    assert messages(document, [wrong]) == []


def test_a_section_that_is_there_is_there_although_something_in_it_is_wrong():
    document = data()
    document["register"] = {"alias": "latest"}
    (message,) = messages(document, [("register", "name")])
    assert message.startswith("register.alias: must not be latest or v1, v2, ...")


def test_a_dotted_target_is_judged_by_its_last_part(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama"}')
    document = data()
    document["base_model_config"] = str(config)
    document["lora"]["target_modules"] = ["self_attn.q_proj", "mlp.q_proy"]
    assert messages(document) == [
        "lora.target_modules: has the unknown module 'mlp.q_proy'; did you mean 'q_proj'?; the model type llama has "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    ]


def test_without_a_base_at_hand_module_names_are_left_to_the_plan_and_the_preflight():
    document = data()
    document["lora"]["target_modules"] = ["anything"]
    assert messages(document) == []


def test_a_local_base_that_cannot_be_read_is_a_problem_of_the_base(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    document = data() | {"base_model": str(tmp_path), "base_model_revision": None}
    (message,) = messages(document)
    assert message.startswith(f"base_model: the header of {tmp_path}/model.safetensors cannot be read: ")


def test_a_base_that_is_not_there_yet_can_be_planned_with_a_configuration(tmp_path):
    document = data() | {"base_model": "/nowhere/base", "base_model_revision": None}
    assert messages(document) == [
        "base_model: there is no file or directory /nowhere/base; to plan without it, set base_model_config"
    ]
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert messages(document | {"base_model_config": str(tmp_path / "config.json")}) == []


def test_a_promotion_names_means_that_are_produced():
    document = data()
    document["lora"]["lora_alpha"] = 16
    document["evaluation"] |= {"metrics": ["loss"], "primary_metric": "eval.loss"}
    document["promotion"] |= {"metric": "eval.perplexity", "max_regression": {"eval.los": 0.1}}
    must = "must be a mean that evaluation.metrics produce (eval.loss), got"
    assert messages(document) == [
        f"promotion.metric: {must} 'eval.perplexity'",
        f"promotion.max_regression: {must} 'eval.los'; did you mean 'eval.loss'?",
    ]


def test_the_best_checkpoint_is_chosen_by_what_is_measured_during_training():
    document = data()
    document["lora"]["lora_alpha"] = 16
    document["training"]["eval_steps"] = 10
    document["register"] = {"name": "pricer", "alias": None, "checkpoint": "best"}
    for primary in ("eval.loss", "eval.perplexity"):
        document["evaluation"]["primary_metric"] = primary
        assert messages(document) == []
    document["evaluation"]["primary_metric"] = "eval.within_20_percent"
    (message,) = messages(document)
    assert message.startswith("register.checkpoint: is best, but during training only eval.loss, eval.perplexity, ")


def test_the_files_of_a_definition_from_another_machine_need_not_be_here():
    document = data()
    document["lora"]["lora_alpha"] = 16
    document["base_model"], document["base_model_revision"] = "/gone/base", None
    document["dataset"] |= {"train": "/gone/rows.jsonl", "train_revision": None, "eval": "/gone/eval.jsonl"}
    assert [message.split(":")[0] for message in messages(document)] == ["base_model", "dataset.train", "dataset.eval"]
    assert find_problems(FieldView(document, elsewhere=True)) == []
    # What is wrong anywhere is wrong here too.
    document["dataset"]["train"] = "/gone/model.gguf"
    assert [problem.path for problem in find_problems(FieldView(document, elsewhere=True))] == [("dataset", "train")]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "give training.lr_scheduler_kwargs either min_lr or min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "give training.lr_scheduler_kwargs.num_decay_steps"),
        (
            {"lr_scheduler_kwargs": {"min_lr": 1e-9}},
            "is no argument of lr_scheduler_type: cosine, which has num_cycles",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 9.0}},
            "must be at most learning_rate",
        ),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 1}}, "which has no arguments"),
    ],
)
def test_a_schedule_takes_its_own_arguments(training, message):
    document = data()
    document["training"] |= training
    document["training"]["lr_scheduler_kwargs"] = dict.fromkeys(LrSchedulerSpec.model_fields) | training.get(
        "lr_scheduler_kwargs", {}
    )
    (found,) = messages(document)
    assert message in found


@pytest.mark.parametrize(
    ("training", "path", "message"),
    [
        ({"early_stopping_patience": 2}, "training.early_stopping_patience", "needs evaluations during training"),
        ({"early_stopping_threshold": 0.1}, "training.early_stopping_threshold", "has no effect without"),
    ],
)
def test_patience_needs_evaluations(training, path, message):
    document = data()
    document["training"] |= training
    (found,) = messages(document)
    assert found.startswith(f"{path}: ")
    assert message in found
