"""Evaluation during training against the model's own loss."""

import math

import pytest
import torch
from helpers.packs import make_arm, make_rows
from torch.nn import functional

from rankwise.modeling.packed_lora import delete_adapter, install
from rankwise.modeling.supervised import SupervisedLogits
from rankwise.training.assess import Assessor
from rankwise.training.living import LivingArm
from rankwise.training.values import ArmTask


def test_arms_in_one_batch_get_the_loss_and_accuracy_of_the_models_own_forward(base):
    rows = {1: make_rows(9, seed=1), 2: make_rows(5, seed=2)}
    arms = [
        LivingArm(
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
    try:
        with torch.no_grad():
            for arm in arms:
                for name, parameter in arm.parameters.items():
                    if "lora_B" in name:
                        parameter.normal_(0, 0.1)
        found = Assessor(base.model, routing, SupervisedLogits(base.model), 3).assess(arms)
        for seed, arm in zip((1, 2), arms, strict=True):
            losses, right = [], []
            for row in rows[seed]:
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
    finally:
        for arm in arms:
            delete_adapter(base.model, arm.name)
