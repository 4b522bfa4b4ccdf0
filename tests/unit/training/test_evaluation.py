"""Evaluation during training against the model's own loss."""

import math

import pytest
import torch
from helpers.packs import make_arm, make_rows
from torch.nn import functional

from rankwise.exceptions import JobError
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import delete_adapter, install
from rankwise.training.arm import ArmTask, TrainingArm
from rankwise.training.evaluation import TrainingEvaluator


@pytest.fixture
def arms(base):
    """Two arms with weights of their own, over 9 and 5 rows, and the routing of their rows."""
    rows = {1: make_rows(9, seed=1), 2: make_rows(5, seed=2)}
    arms = [
        TrainingArm(
            ArmTask(
                spec=make_arm(seed=seed, evaluation={"per_device_eval_batch_size": 3}),
                train=rows[seed],
                evaluation=rows[seed],
            ),
            base.model,
        )
        for seed in (1, 2)
    ]
    routing = install(base.model)
    with torch.no_grad():
        for arm in arms:
            for name, parameter in arm.parameters.items():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
    yield arms, routing
    for arm in arms:
        delete_adapter(base.model, arm.name)


def test_arms_in_one_batch_get_the_loss_and_accuracy_of_the_models_own_forward(base, arms):
    arms, routing = arms
    found = TrainingEvaluator(base.model, routing, SupervisedLogits(base.model), 3).evaluate(arms)
    for arm in arms:
        losses, right = [], []
        for row in arm.task.evaluation:
            ids = torch.from_numpy(row.input_ids.astype("int64"))[None]
            with torch.no_grad(), routing.adapter(arm.name, 1):
                logits = base.model(input_ids=ids).logits[0, :-1][row.supervised[1:]]
            targets = ids[0, 1:][torch.from_numpy(row.supervised[1:])]
            losses += functional.cross_entropy(logits, targets, reduction="none").tolist()
            right += (logits.argmax(-1) == targets).tolist()
        metrics = found[arm.spec_hash]
        assert metrics["eval.loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert metrics["eval.perplexity"] == pytest.approx(math.exp(metrics["eval.loss"]))
        assert metrics["eval.token_accuracy"] == pytest.approx(sum(right) / len(right))


class Scarce:
    """Logits on a device with memory for so many rows."""

    def __init__(self, model, rows):
        self.logits = SupervisedLogits(model)
        self.rows = rows
        self.asked = []

    def __call__(self, input_ids, *rest):
        self.asked.append(len(input_ids))
        if len(input_ids) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.logits(input_ids, *rest)


def test_out_of_memory_halves_the_rows_that_are_evaluated_together_for_good(base, arms, caplog):
    arms, routing = arms
    wanted = TrainingEvaluator(base.model, routing, SupervisedLogits(base.model), 3).evaluate(arms)
    scarce = Scarce(base.model, rows=2)
    evaluator = TrainingEvaluator(base.model, routing, scarce, 3)
    for found in (evaluator.evaluate(arms), evaluator.evaluate(arms)):
        for spec_hash, metrics in wanted.items():
            assert found[spec_hash] == pytest.approx(metrics, rel=1e-5)
    assert scarce.asked == [6, 3, *[1] * 28]
    assert "out of memory: at most 1 rows are evaluated together from now on" in caplog.text


def test_one_row_that_does_not_fit_is_an_error_that_names_the_setting(base, arms):
    arms, routing = arms
    with pytest.raises(JobError, match=r"one evaluation row on cpu: lower training\.max_length"):
        TrainingEvaluator(base.model, routing, Scarce(base.model, rows=0), 3).evaluate(arms)


def test_an_error_of_another_kind_is_not_taken_for_the_end_of_memory(base, arms):
    arms, routing = arms

    def wrong(*_):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        TrainingEvaluator(base.model, routing, wrong, 3).evaluate(arms)
