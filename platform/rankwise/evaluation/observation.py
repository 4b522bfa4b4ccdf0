"""What one model did on one evaluation example: the input of every metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One example under one adapter (or the bare base).

    Attributes:
        id: The example's id; the same example has the same id under every adapter, so results can be paired.
        prompt: The rendered prompt, generation prompt included.
        reference: The assistant text of the data.
        columns: The row's own columns, for metrics that need more than the texts.
        loss_sum: Negative log likelihood in nats, summed over the supervised tokens (teacher forced).
        tokens: Number of supervised tokens.
        correct_tokens: Supervised tokens whose most likely prediction (the reference before it given) is right.
        prediction: Greedy generation from the prompt; None where no metric asked for one.
        finish_reason: `stop` (an end token came) or `length`; None without a generation.
    """

    id: str
    prompt: str
    reference: str
    loss_sum: float
    tokens: int
    correct_tokens: int
    prediction: str | None = None
    finish_reason: str | None = None
    columns: Mapping[str, object] = field(default_factory=dict)
