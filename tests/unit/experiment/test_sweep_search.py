"""Searches as definitions: random draws and rounds of proposals, with derived values, conditions and results."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
from helpers.definitions import changed, parse

from rankwise.exceptions import ConfigError
from rankwise.experiment.experiment import ArmResult, parse_experiment
from rankwise.experiment.search import TrialState

GRID = "  parameters:\n    lora.r: [4, 8]"
RANGES = "    lora.r: {int: [2, 64], log: true}\n    training.learning_rate: {log_uniform: [1e-4, 1e-2]}\n"
RANDOM = f"  method: random\n  trials: 6\n  parameters:\n{RANGES}  where: r != 3 and lora_alpha <= 64"
TPE = f"  method: tpe\n  trials: 10\n  round_size: 4\n  parameters:\n{RANGES}"


def rounds(experiment, known):
    def results_of(arms):
        return {arm.spec_hash: known[arm.spec_hash] for arm in arms if arm.spec_hash in known}

    return experiment.rounds(results_of)


def results(found, value) -> dict[str, ArmResult]:
    return {
        arm.spec_hash: ArmResult(state=TrialState.COMPLETE, value=value(arm)) for each in found for _, arm in each.arms
    }


def valley(arm) -> float:
    return abs(math.log(arm.training.learning_rate / 2e-3)) + abs(math.log(arm.lora.r / 16))


def test_random_arms_are_all_known_differ_and_meet_the_condition():
    arms = parse((GRID, RANDOM)).arms
    assert len({arm.spec_hash for arm in arms}) == 6
    assert all(arm.lora.r != 3 and arm.lora.lora_alpha == 2 * arm.lora.r <= 64 for arm in arms)
    assert not parse((GRID, RANDOM)).is_search
    parse((GRID, RANDOM)).require_known_arms()


def test_the_seed_of_the_search_is_its_own_or_the_definition_s():
    arms = parse((GRID, RANDOM)).arms
    assert parse((GRID, RANDOM)).arms == arms
    own = parse((GRID, f"{RANDOM}\n  seed: 1")).arms
    assert [arm.lora.r for arm in own] != [arm.lora.r for arm in arms]
    shared = parse((GRID, RANDOM), ("  warmup_steps: 5", "  warmup_steps: 5\nseed: 1")).arms
    assert [arm.lora.r for arm in shared] == [arm.lora.r for arm in own]
    assert {arm.seed for arm in own} == {0}


def test_a_recorded_definition_gives_the_same_arms():
    for sweep in (RANDOM, TPE):
        experiment = parse((GRID, sweep))
        assert parse_experiment(experiment.text, "again.yaml").labelled_arms == experiment.labelled_arms


def test_a_field_that_only_the_search_gives_is_no_gap():
    assert len(parse((GRID, RANDOM), ("  r: 8\n", "")).arms) == 6


def test_an_override_can_be_a_range():
    experiment = parse(
        (GRID, f"{GRID}\n  method: random\n  trials: 3"), overrides=("sweep.parameters.lora.r={int: [2, 9]}",)
    )
    assert len(experiment.arms) == 3


def test_rounds_follow_from_results_and_from_nothing_else():
    experiment = parse((GRID, TPE))
    assert experiment.is_search
    (first,) = rounds(experiment, {})
    assert [arm for _, arm in first.arms] == list(experiment.arms)
    found = rounds(experiment, results([first], valley))
    assert len(found) == 2
    assert found[0] == first
    found = rounds(experiment, results(found, valley))
    assert [len(each.arms) for each in found] == [4, 4, 2]
    assert rounds(experiment, results(found, valley)) == found
    hashes = [arm.spec_hash for each in found for _, arm in each.arms]
    assert len(set(hashes)) == 10
    # Half a round is no round: nothing is proposed before all of it has ended.
    half = dict(list(results([first], valley).items())[:2])
    assert rounds(experiment, half) == (first,)


def test_another_process_that_knows_the_results_proposes_the_same_round():
    experiment = parse((GRID, TPE))
    known = results(rounds(experiment, {}), valley)
    code = (
        "import json, sys\n"
        "from rankwise.experiment.experiment import ArmResult, Experiment\n"
        "from rankwise.experiment.search import TrialState\n"
        "sent, values = json.load(sys.stdin)\n"
        "known = {name: ArmResult(state=TrialState.COMPLETE, value=value) for name, value in values.items()}\n"
        "found = Experiment.from_json(sent).rounds(lambda arms: known)\n"
        "print(json.dumps([label for each in found for label, _ in each.arms]))"
    )
    given = json.dumps([experiment.to_json(), {name: result.value for name, result in known.items()}])
    done = subprocess.run([sys.executable, "-c", code], input=given, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [label for each in rounds(experiment, known) for label, _ in each.arms]


def test_conditions_and_derived_values_hold_in_later_rounds_too():
    experiment = parse((GRID, f"{TPE}  where: r != 3 and lora_alpha <= 64"))
    found = rounds(experiment, results(rounds(experiment, {}), valley))
    assert all(arm.lora.lora_alpha == 2 * arm.lora.r <= 64 for _, arm in found[1].arms)


def test_an_arm_that_cannot_work_stops_the_first_round_and_is_no_proposal_later():
    steps = TPE.replace("    lora.r: {int: [2, 64], log: true}\n", "    training.max_steps: {int: [1, 9]}\n")
    with pytest.raises(ConfigError, match=r"training\.warmup_steps: must be at most max_steps"):
        parse((GRID, steps))
    rare = steps.replace("[1, 9]", "[1, 400]").replace("trials: 10", "trials: 40").replace("size: 4", "size: 20")
    experiment = parse((GRID, rare))

    def shorter(arm) -> float:
        return arm.training.max_steps

    found = rounds(experiment, results(rounds(experiment, {}), shorter))
    assert min(arm.training.max_steps for _, arm in found[1].arms) >= 5


def test_a_space_that_is_used_up_ends_the_search_early(monkeypatch):
    monkeypatch.setattr("rankwise.experiment.search.MAX_REJECTED", 100)
    experiment = parse(
        (
            GRID,
            "  method: tpe\n  trials: 12\n  round_size: 6\n  parameters:\n    lora.r: {int: [1, 12]}\n  where: r < 9",
        )
    )
    found = rounds(experiment, results(rounds(experiment, {}), valley))
    assert [len(each.arms) for each in found] == [6, 2]
    assert rounds(experiment, results(found, valley)) == found


def test_a_search_by_results_cannot_be_submitted_at_once():
    with pytest.raises(ConfigError, match=r"^sweep\.method: tpe proposes .* run the search with `rankwise run FILE`"):
        parse((GRID, TPE)).require_known_arms()


def test_early_stopping_does_not_change_what_an_arm_is():
    plain = parse().arms
    stopped = parse((GRID, f"{GRID}\n  early_stopping: {{min_steps: 4, eta: 2}}")).arms
    assert [arm.spec_hash for arm in stopped] == [arm.spec_hash for arm in plain]
    assert changed().count("early_stopping") == 0
