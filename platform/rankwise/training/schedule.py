"""The learning rate as a pure function of the step, by the schedules of transformers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from rankwise.experiment.schema import TrainingSpec


def learning_rates(training: TrainingSpec, steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step, counted from 0, in a training of `steps` steps.

    The factors are those of `transformers.get_scheduler`; its optimizer is not used. A decay of less than one step
    (`num_decay_steps`, `num_stable_steps`) is a share of all steps, rounded up as that of the warmup is.
    """
    arguments = training.lr_scheduler_kwargs.given()
    for name in ("num_decay_steps", "num_stable_steps"):
        if (value := arguments.get(name)) is not None:
            arguments[name] = math.ceil(value * steps) if value < 1 else int(value)
    scheduler = get_scheduler(
        training.lr_scheduler_type,
        torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate),
        num_warmup_steps=training.warmup(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments or None,
    )
    (factor,) = scheduler.lr_lambdas
    return lambda step: training.learning_rate * float(factor(step))
