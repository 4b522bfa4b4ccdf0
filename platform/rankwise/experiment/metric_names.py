"""Metrics by name: which keys each gives, which way is better, whether it needs generated text.

A metric is what `evaluation.metrics` lists; its keys are what MLflow and `compare` show. Built-in metrics stand in one
table here, so that a definition is checked without numpy or torch. Those of other packages are entry points of the
group `rankwise.metrics`: they are asked for by name, and the one that a definition lists is loaded, since nothing but
the decorated function says what its keys are. (It is `evaluation.metrics.metric` that makes it; of the object only the
attributes of `MetricFacts` are read here.)
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
PREFIX = "eval."

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
"""Keys of built-in metrics of which a greater value is better; of their other keys a smaller one is."""

GENERATED: frozenset[str] = frozenset({"exact_match", "number"})
"""Built-in metrics that need generated text, not only the loss's forward pass."""

DERIVED: frozenset[str] = frozenset({"eval.perplexity"})
"""Keys of built-in metrics that are no mean over examples, but a function of one."""

PER_TOKEN: frozenset[str] = frozenset({"eval.loss", "eval.perplexity", "eval.token_accuracy"})
"""Keys whose values depend on how a tokenizer cuts texts, so that they compare over one tokenizer only."""


@dataclass(frozen=True, kw_only=True)
class MetricFacts:
    """What a metric says of itself.

    Attributes:
        keys: Its means, as MLflow keys.
        derived: Keys that are functions of its means.
        greater_is_better: Those of all keys of which more is better.
        needs_generation: Whether it reads generated text.
        origin: The package and its version, `NAME==VERSION`; empty for a built-in metric.
    """

    keys: tuple[str, ...]
    derived: tuple[str, ...]
    greater_is_better: frozenset[str]
    needs_generation: bool
    origin: str = ""

    @property
    def all_keys(self) -> tuple[str, ...]:
        """Keys of the means, then those of what is derived from them."""
        return (*self.keys, *self.derived)


def known_names() -> tuple[str, ...]:
    """Every name that `evaluation.metrics` may list: the built-in ones, then those of installed packages."""
    return (*METRIC_KEYS, *sorted({point.name for point in _points()} - set(METRIC_KEYS)))


def facts(name: str) -> MetricFacts:
    """What the metric of this name says of itself; one of another package is loaded.

    Raises:
        ConfigError: There is no such metric, or its entry point does not hold a usable one.
    """
    if name in METRIC_KEYS:
        keys = METRIC_KEYS[name]
        return MetricFacts(
            keys=tuple(key for key in keys if key not in DERIVED),
            derived=tuple(key for key in keys if key in DERIVED),
            greater_is_better=GREATER_IS_BETTER & set(keys),
            needs_generation=name in GENERATED,
        )
    return _facts_of_package(name)


def load(name: str) -> Any:
    """The object behind the entry point of this name.

    Raises:
        ConfigError: There is none, it cannot be imported, or it is no metric of this name.
    """
    point = next((point for point in _points() if point.name == name), None)
    if point is None:
        near = difflib.get_close_matches(name, known_names(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"there is no metric {name!r}; there are {', '.join(known_names())}{hint}")
    try:
        found = point.load()
    except Exception as error:  # Whatever the package's code raises while it is imported.
        raise ConfigError(
            f"the metric {name!r} of {_origin(point)} cannot be loaded from {point.value!r}: "
            f"{type(error).__name__}: {error}; mend or uninstall the package"
        ) from error
    if getattr(found, "name", None) != name or not hasattr(found, "greater_is_better"):
        raise ConfigError(
            f"entry point {point.value!r} of group {ENTRY_POINT_GROUP!r} is not the metric {name!r}; "
            f"decorate the function with @metric({name!r}, keys=[...])"
        )
    return found


def keys_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """Keys that these metrics produce together, in their order.

    Raises:
        ConfigError: As `facts`.
    """
    return tuple(key for metric in metrics for key in facts(metric).all_keys)


def means_of(metrics: Iterable[str]) -> tuple[str, ...]:
    """Those of the keys that are means over examples, of which paired differences can be taken.

    Raises:
        ConfigError: As `facts`.
    """
    return tuple(key for metric in metrics for key in facts(metric).keys)


def needs_generation(metrics: Iterable[str]) -> bool:
    """Whether one of these metrics reads generated text.

    Raises:
        ConfigError: As `facts`.
    """
    return any(facts(metric).needs_generation for metric in metrics)


def greater_is_better(key: str) -> bool:
    """Whether a greater value of this key is the better one.

    Raises:
        ConfigError: No metric that is installed gives this key: taken for the wrong direction, the worst arm would win.
    """
    if any(key in keys for keys in METRIC_KEYS.values()):
        return key in GREATER_IS_BETTER
    problems = []
    for name in known_names():
        try:
            found = facts(name)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if key in found.all_keys:
            return key in found.greater_is_better
    raise ConfigError(
        "\n".join(
            [
                f"no metric that is installed here gives {key}, so it is not known which way is better: install the "
                f"package that it comes from; there are {', '.join(known_names())}",
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
    found = load(name)
    keys, derived = tuple(found.keys), tuple(found.derived)
    built_in = {key for each in METRIC_KEYS.values() for key in each}
    wrong = [key for key in (*keys, *derived) if not key.startswith(PREFIX) or key in built_in]
    if wrong or not keys:
        raise ConfigError(
            f"the metric {name!r} gives the keys {', '.join((*keys, *derived)) or '(none)'}; a key begins with "
            f"{PREFIX!r} and is none of the built-in metrics'"
        )
    return MetricFacts(
        keys=keys,
        derived=derived,
        greater_is_better=frozenset(found.greater_is_better),
        needs_generation=bool(found.needs_generation),
        origin=_origin(next(point for point in _points() if point.name == name)),
    )
