"""Mutations of valid definitions: values are replaced by odd ones, removed, or misspelled."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML

ODD: tuple[Any, ...] = (
    None, [], {}, "", " ", "x", "org/", "./x", "2*r", "r**r", "é\u0000", 0, -1, 1.5, 10**30, float("nan"), True,
    ["random"], [None], [[]], {"int": [2, 64]}, {"a": {"b": 1}}, "models:/x@y",
)  # fmt: skip
SWEEPS: dict[str, dict[str, Any]] = {
    "grid": {"parameters": {"lora.r": [4, 8], "seed": [0, 1]}, "where": "lora.r <= 8"},
    "list": {"arms": [{"lora.r": 4}, {"lora.r": 8, "training.learning_rate": 1e-3}]},
    "random": {"method": "random", "trials": 3, "parameters": {"lora.r": {"int": [2, 64], "log": True}}},
    "tpe": {
        "method": "tpe", "trials": 4, "round_size": 2, "seed": 1,
        "parameters": {"training.learning_rate": {"log_uniform": [1e-4, 1e-2]}, "lora.r": {"choice": [2, 4]}},
    },
    "halving": {
        "parameters": {"lora.r": [2, 4, 8]},
        "early_stopping": {"method": "successive_halving", "min_steps": 5, "eta": 2},
    },
}  # fmt: skip


def load(text: str) -> dict[str, Any]:
    """The text of a definition as plain values."""
    data: dict[str, Any] = YAML(typ="safe").load(text)
    return data


def written(data: dict[str, Any]) -> str:
    """A definition as text."""
    text = io.StringIO()
    YAML(typ="safe").dump(data, text)
    return text.getvalue()


def mutations(data: dict[str, Any], seed: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """All mutations of a definition with one change, described, in an order that depends on the seed only."""
    changes = [(path, change) for path in _places(data) for change in (*ODD, "remove", "rename")]
    random.Random(seed).shuffle(changes)
    for path, change in changes:
        yield f"{'.'.join(map(str, path))} = {change!r}", _mutated(data, path, change)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _mutated(data: dict[str, Any], path: tuple[Any, ...], change: Any) -> dict[str, Any]:
    changed = copy.deepcopy(data)
    parent: Any = changed
    for key in path[:-1]:
        parent = parent[key]
    if change == "remove":
        del parent[path[-1]]
    elif change == "rename":
        if isinstance(parent, dict):
            parent[f"{path[-1]}s"] = parent.pop(path[-1])
    else:
        parent[path[-1]] = change
    return changed
