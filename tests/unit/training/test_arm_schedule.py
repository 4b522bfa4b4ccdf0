"""Schedules against transformers' own."""

import pytest
import torch
from transformers import get_scheduler

from rankwise.training.arm import Schedule


@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (12, 10), (0, 1), (1, 1)])
def test_the_learning_rate_is_that_of_transformers_at_every_step(kind, warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    reference = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    mine = Schedule(kind=kind, peak=3e-3, warmup=warmup, total=total)
    for step in range(total + 2):
        assert mine.learning_rate(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-12, abs=0)
        optimizer.step()
        reference.step()
