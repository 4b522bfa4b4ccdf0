"""Learning rate schedules, by the formulas of `transformers.optimization`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a pure function of the step, so that there is no state to save.

    Attributes:
        kind: Name as in TrainingArguments.
        peak: The learning rate after warm-up.
        warmup: Steps of linear warm-up.
        total: Optimizer steps of the whole training.
    """

    kind: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    peak: float
    warmup: int
    total: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return self.peak * self._factor(step)

    def _factor(self, step: int) -> float:
        if self.kind == "constant":
            return 1.0
        if step < self.warmup:
            return step / max(1, self.warmup)
        if self.kind == "constant_with_warmup":
            return 1.0
        rest = max(1, self.total - self.warmup)
        if self.kind == "linear":
            return max(0.0, (self.total - step) / rest)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup) / rest)))
