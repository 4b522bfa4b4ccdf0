"""No definition causes a traceback: values of valid definitions are replaced by odd ones, removed, or misspelled."""

from __future__ import annotations

import copy
import io
import random
from collections.abc import Iterator
from typing import Any

import pytest
from helpers.definitions import DEFINITION
from ruamel.yaml import YAML

from rankwise.exceptions import RankwiseError
from rankwise.experiment.experiment import parse_experiment
from rankwise.experiment.plan import make_plan

ODD: tuple[Any, ...] = (
    None, [], {}, "", " ", "x", "org/", "./x", "2*r", "r**r", "é\u0000", 0, -1, 1.5, 10**30, float("nan"), True,
    ["random"], [None], [[]], {"int": [2, 64]}, {"a": {"b": 1}}, "models:/x@y",
)  # fmt: skip
SWEEPS = {
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
MOST = 160
"""Mutations of each definition that are tried; which ones depends on the definition only."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(data: dict[str, Any], path: tuple[Any, ...], change: Any) -> dict[str, Any]:
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


def written(data: dict[str, Any]) -> str:
    text = io.StringIO()
    YAML(typ="safe").dump(data, text)
    return text.getvalue()


@pytest.mark.parametrize("kind", SWEEPS)
def test_every_mutation_of_a_definition_is_accepted_or_refused_with_a_message(kind):
    data = YAML(typ="safe").load(DEFINITION) | {"sweep": SWEEPS[kind]}
    parse_experiment(written(data), "valid.yaml")
    mutations = [(path, change) for path in places(data) for change in (*ODD, "remove", "rename")]
    random.Random(kind).shuffle(mutations)
    outcomes = {"accepted": 0, "refused": 0}
    for path, change in mutations[:MOST]:
        text = written(mutated(data, path, change))
        try:
            experiment = parse_experiment(text, "mutated.yaml")
            make_plan(experiment)
        except RankwiseError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{path} = {change!r} of the {kind} gives {type(error).__name__}: {error}") from error
        else:
            outcomes["accepted"] += 1
    assert min(outcomes.values()) > MOST // 20, outcomes


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
@pytest.mark.parametrize("source", ["base_model", "dataset.train"])
def test_a_misspelled_source_is_named_whatever_the_method(method, source):
    data = YAML(typ="safe").load(DEFINITION) | {"sweep": SWEEPS[method]}
    section, _, key = source.rpartition(".")
    (data[section] if section else data)[key] = "SmolLM2-135M"
    with pytest.raises(RankwiseError, match=rf"{source}: must be org/name on the hub.* got 'SmolLM2-135M'"):
        parse_experiment(written(data), "typo.yaml")
