"""Rows of an architecture that depend on their neighbours go through separate passes."""

import logging

import pytest
import torch
from helpers.matrix import SAME_WEIGHTS, Subject
from helpers.packs import distance, read_weights

from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.training.row_check import rows_are_independent


@pytest.fixture
def dependent(tmp_path):
    """A Llama whose embedding adds the share of padding in the batch: rows depend on their neighbours."""
    torch.set_num_threads(1)
    subject = Subject("llama", tmp_path)
    embedding = subject.base.model.get_input_embeddings()

    def add_width(module, args, output):
        return output + 0.05 * args[0].shape[1]

    embedding.register_forward_hook(add_width)
    return subject


def test_usual_models_are_independent(tmp_path):
    subject = Subject("llama", tmp_path)
    assert rows_are_independent(subject.base.model, SupervisedLogits(subject.base.model))


def test_a_dependence_is_seen_and_said_once(dependent, caplog):
    model = dependent.base.model
    for _ in range(2):
        assert not rows_are_independent(model, SupervisedLogits(model))
    assert caplog.text.count("a row's logits depend on its neighbours") == 1
    assert "separate passes, which is slower" in caplog.text


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_arms_of_such_a_model_train_as_if_alone(dependent, caplog, dropout):
    dependent.arms = [
        arm.model_copy(update={"lora": arm.lora.model_copy(update={"lora_dropout": dropout})}) for arm in dependent.arms
    ]
    with caplog.at_level(logging.WARNING):
        outcomes, recorder = dependent.train(dependent.base, [0, 1], dependent.root / "packed")
    assert "separate passes" in caplog.text
    for index, arm in enumerate(dependent.arms):
        own, own_recorder = dependent.train(dependent.base, [index], dependent.root / f"own-{index}")
        assert recorder.losses(arm.spec_hash) == pytest.approx(own_recorder.losses(arm.spec_hash), rel=1e-5)
        weights = (read_weights(result[arm.spec_hash].adapter) for result in (outcomes, own))
        assert distance(*weights) < SAME_WEIGHTS


def test_evaluation_of_such_a_model_does_not_depend_on_neighbours(dependent):
    from rankwise.training.arm import ArmTask
    from rankwise.training.loop import train_pack

    metrics = {}
    for which in ([0], [1], [0, 1]):
        tasks = [
            ArmTask(
                spec=dependent.arms[index].model_copy(
                    update={"training": dependent.arms[index].training.model_copy(update={"eval_steps": 3})}
                ),
                train=dependent.rows[index],
                evaluation=dependent.rows[index][:4],
            )
            for index in which
        ]
        directory = dependent.root / "evaluated" / "-".join(map(str, which))
        for index, outcome in zip(which, train_pack(dependent.base, tasks, directory=directory).values(), strict=True):
            metrics[len(which), index] = outcome.metrics["eval.loss"]
    assert metrics[1, 0] == pytest.approx(metrics[2, 0], rel=1e-5)
    assert metrics[1, 1] == pytest.approx(metrics[2, 1], rel=1e-5)
