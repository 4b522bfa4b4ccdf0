"""Names of the built-in metrics and of the keys they produce: one table for the schema, the evaluator and compare.

A metric is what `evaluation.metrics` lists; its keys are what MLflow and `compare` show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

METRIC_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "loss": ("eval.loss", "eval.perplexity"),
        "token_accuracy": ("eval.token_accuracy",),
        "exact_match": ("eval.exact_match",),
        "number": (
            "eval.mean_absolute_error",
            "eval.mean_relative_error",
            "eval.within_20_percent",
            "eval.parse_failures",
        ),
    }
)
"""Keys that each built-in metric produces."""

GREATER_IS_BETTER: frozenset[str] = frozenset({"eval.token_accuracy", "eval.exact_match", "eval.within_20_percent"})
"""Keys of which a greater value is better; of every other key a smaller one is."""

GENERATED: frozenset[str] = frozenset({"exact_match", "number"})
"""Metrics that need generated text, not only the loss's forward pass."""


def keys_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """Keys that these metrics produce together, in their order; unknown names produce none."""
    return tuple(key for metric in metrics for key in METRIC_KEYS.get(metric, ()))


def greater_is_better(key: str) -> bool:
    """Whether a greater value of this key is the better one."""
    return key in GREATER_IS_BETTER
