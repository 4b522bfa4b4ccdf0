from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler

from rankwise.experiment.schema import TrainingSpec
from rankwise.training.schedule import learning_rates

STEPS = 50


def rates(kind, arguments=None, **training):
    spec = TrainingSpec(lr_scheduler_type=kind, lr_scheduler_kwargs=arguments or {}, max_steps=STEPS, **training)
    rate = learning_rates(spec, STEPS)
    return [rate(step) for step in range(STEPS)]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("linear", {}),
        ("cosine", {}),
        ("cosine", {"num_cycles": 1.0}),
        ("cosine_with_min_lr", {"min_lr": 1e-4}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("warmup_stable_decay", {"num_decay_steps": 10}),
        ("warmup_stable_decay", {"num_decay_steps": 20, "min_lr_ratio": 0.2, "decay_type": "1-sqrt"}),
    ],
)
def test_rates_are_those_of_transformers(kind, arguments):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    theirs = get_scheduler(
        kind, optimizer, num_warmup_steps=5, num_training_steps=STEPS, scheduler_specific_kwargs=arguments or None
    )
    expected = []
    for _ in range(STEPS):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(kind, arguments, learning_rate=2e-3, warmup_steps=5) == pytest.approx(expected, rel=1e-12)


def test_a_decay_may_be_a_share_of_all_steps():
    whole = rates("warmup_stable_decay", {"num_decay_steps": 10})
    assert rates("warmup_stable_decay", {"num_decay_steps": 0.2}) == whole
    assert whole[: STEPS - 10] == [2e-4] * (STEPS - 10)
    assert whole[-1] < whole[STEPS - 10]


def test_the_least_rate_is_reached_and_not_passed():
    found = rates("cosine_with_min_lr", {"min_lr_rate": 0.25}, learning_rate=1.0)
    assert math.isclose(min(found), found[-1])
    assert 0.25 <= found[-1] < 0.26
