"""No definition causes a traceback: values of valid definitions are replaced by odd ones, removed, or misspelled."""

from __future__ import annotations

from itertools import islice

import pytest
from helpers.definitions import DEFINITION
from helpers.mutations import SWEEPS, load, mutations, written

from rankwise.exceptions import RankwiseError
from rankwise.experiment.experiment import parse_experiment
from rankwise.experiment.plan import make_plan

MOST = 160
"""Mutations of each definition that are tried; which ones depends on the definition only."""


@pytest.mark.parametrize("kind", SWEEPS)
def test_every_mutation_of_a_definition_is_accepted_or_refused_with_a_message(kind):
    data = load(DEFINITION) | {"sweep": SWEEPS[kind]}
    parse_experiment(written(data), "valid.yaml")
    outcomes = {"accepted": 0, "refused": 0}
    for change, mutated in islice(mutations(data, kind), MOST):
        try:
            experiment = parse_experiment(written(mutated), "mutated.yaml")
            make_plan(experiment)
        except RankwiseError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{change} of the {kind} gives {type(error).__name__}: {error}") from error
        else:
            outcomes["accepted"] += 1
    assert min(outcomes.values()) > MOST // 20, outcomes


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
@pytest.mark.parametrize("source", ["base_model", "dataset.train"])
def test_a_misspelled_source_is_named_whatever_the_method(method, source):
    data = load(DEFINITION) | {"sweep": SWEEPS[method]}
    section, _, key = source.rpartition(".")
    (data[section] if section else data)[key] = "SmolLM2-135M"
    with pytest.raises(RankwiseError, match=rf"{source}: must be org/name on the hub.* got 'SmolLM2-135M'"):
        parse_experiment(written(data), "typo.yaml")
