"""Metrics by name: their keys, which direction is better, and whether they need generated text.

The built-in metrics are one table, so that a definition can be checked without numpy or torch. Other packages provide
metrics as entry points of the group `rankwise.metrics`, decorated with `evaluation.metrics.metric`. Only those that a
definition lists are loaded: a metric's keys are known to the decorated function alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

from rankwise.exceptions import ConfigError

ENTRY_POINT_GROUP = "rankwise.metrics"
KEY_PREFIX = "eval."

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
"""Keys of built-in metrics for which greater is better; for their other keys, smaller is better."""

GENERATIVE_METRICS: frozenset[str] = frozenset({"exact_match", "number"})
"""Built-in metrics that need generated text, not only a forward pass."""

DERIVED_KEYS: frozenset[str] = frozenset({"eval.perplexity"})
"""Keys of built-in metrics that are a function of a mean over examples, not a mean themselves."""

SOURCE_PREFIX = "eval.loss."
"""With several sources of evaluation rows, `loss` also gives the mean of each: `eval.loss.LABEL`."""

TOKENIZER_DEPENDENT: frozenset[str] = frozenset({"eval.loss", "eval.perplexity", "eval.token_accuracy"})
"""Keys whose values depend on the tokenizer, so that they are comparable only with the same tokenizer."""


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """What a metric declares: the MLflow keys of its means, and keys derived from them.

    `greater_is_better` is the subset of all keys for which greater is better. `origin` is the package as
    `NAME==VERSION`; empty for a built-in metric.
    """

    keys: tuple[str, ...]
    derived: tuple[str, ...]
    greater_is_better: frozenset[str]
    needs_generation: bool
    origin: str = ""

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Keys of the means, then derived keys."""
        return (*self.keys, *self.derived)


def source_keys(metrics: Iterable[str], labels: Iterable[str]) -> tuple[str, ...]:
    """The keys of the means over single sources, as these metrics produce them."""
    return tuple(SOURCE_PREFIX + label for label in labels) if "loss" in set(metrics) else ()


def depends_on_tokenizer(key: str) -> bool:
    """Whether values of a key are comparable only with the same tokenizer."""
    return key in TOKENIZER_DEPENDENT or key.startswith(SOURCE_PREFIX)


def known_names() -> tuple[str, ...]:
    """Names that `evaluation.metrics` may list: built-in metrics, then those of installed packages."""
    return (*METRIC_KEYS, *sorted({point.name for point in _points()} - set(METRIC_KEYS)))


def metric_facts(name: str) -> MetricFacts:
    """The facts of a metric; a metric of another package is loaded.

    Raises:
        ConfigError: The metric does not exist, or its entry point does not hold a usable one.
    """
    if name in METRIC_KEYS:
        keys = METRIC_KEYS[name]
        return MetricFacts(
            keys=tuple(key for key in keys if key not in DERIVED_KEYS),
            derived=tuple(key for key in keys if key in DERIVED_KEYS),
            greater_is_better=GREATER_IS_BETTER & set(keys),
            needs_generation=name in GENERATIVE_METRICS,
        )
    return _facts_of_package(name)


def load_metric(name: str) -> Any:
    """Load a metric from its entry point.

    Raises:
        ConfigError: The entry point does not exist, cannot be imported, or is not the metric of this name.
    """
    point = next((point for point in _points() if point.name == name), None)
    if point is None:
        near = difflib.get_close_matches(name, known_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no metric {name!r}; available: {', '.join(known_names())}{hint}")
    try:
        metric = point.load()
    except Exception as error:  # The package's code may raise anything on import.
        raise ConfigError(
            f"the metric {name!r} of {_origin(point)} cannot be loaded from {point.value!r}: "
            f"{type(error).__name__}: {error}; fix or uninstall the package"
        ) from error
    if getattr(metric, "name", None) != name or not hasattr(metric, "greater_is_better"):
        raise ConfigError(
            f"entry point {point.value!r} of group {ENTRY_POINT_GROUP!r} is not the metric {name!r}; "
            f"decorate the function with @metric({name!r}, keys=[...])"
        )
    return metric


def keys_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """All keys that these metrics produce, in order."""
    return tuple(key for metric in metrics for key in metric_facts(metric).all_keys)


def means_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """The keys that are means over examples, for which paired differences exist."""
    return tuple(key for metric in metrics for key in metric_facts(metric).keys)


def needs_generation(metrics: Iterable[str]) -> bool:
    """Whether any of these metrics needs generated text."""
    return any(metric_facts(metric).needs_generation for metric in metrics)


def greater_is_better(key: str) -> bool:
    """Whether a greater value of this key is better.

    Raises:
        ConfigError: No installed metric produces this key. Guessing the direction could make the worst arm win.
    """
    if key.startswith(SOURCE_PREFIX) or any(key in keys for keys in METRIC_KEYS.values()):
        return key in GREATER_IS_BETTER
    problems = []
    for name in known_names():
        try:
            facts = metric_facts(name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if key in facts.all_keys:
            return key in facts.greater_is_better
    raise ConfigError(
        "\n".join(
            [
                f"no installed metric produces {key}, so whether greater is better is unknown; install the package "
                f"that provides it; available: {', '.join(known_names())}",
                *problems,
            ]
        )
    )


def _points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=ENTRY_POINT_GROUP))


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name}=={point.dist.version}" if point.dist is not None else point.value


@cache
def _facts_of_package(name: str) -> MetricFacts:
    metric = load_metric(name)
    keys, derived = tuple(metric.keys), tuple(metric.derived)
    built_in = {key for metric_keys in METRIC_KEYS.values() for key in metric_keys}
    wrong = [key for key in (*keys, *derived) if not key.startswith(KEY_PREFIX) or key in built_in]
    if wrong or not keys:
        raise ConfigError(
            f"the metric {name!r} has the keys {', '.join((*keys, *derived)) or '(none)'}; a key must start with "
            f"{KEY_PREFIX!r} and must not be a key of a built-in metric"
        )
    return MetricFacts(
        keys=keys,
        derived=derived,
        greater_is_better=frozenset(metric.greater_is_better),
        needs_generation=bool(metric.needs_generation),
        origin=_origin(next(point for point in _points() if point.name == name)),
    )
