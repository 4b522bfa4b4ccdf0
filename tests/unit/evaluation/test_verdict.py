from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.comparisons import arm, ranks, seeds_and_rates

from rankwise.evaluation.compare import compare
from rankwise.evaluation.gather import Influences
from rankwise.evaluation.smallest_rank import find_smallest_rank, source_of

EXAMPLES = tuple(f"example-{number}" for number in range(200))


def alike(noise: float):
    """Every arm finds the same examples hard; `noise` is the standard error of a difference that is left."""

    def read(arms):
        hard = np.random.default_rng(0).normal(0.0, 0.02 / 14, len(EXAMPLES))
        found = {}
        for each in arms:
            own = np.random.default_rng(list(each.run_id.encode())).normal(0.0, noise / 20, len(EXAMPLES))
            found[each.run_id] = Influences(EXAMPLES, hard + own - np.mean(hard + own))
        return found

    return read


def nothing(arms):
    return {}


def losses(*values, **changes):
    arms = [arm(2**at, value) for at, value in enumerate(values, start=1)]
    return compare("x", arms, **{"primary_metric": "eval.loss", "greater_is_better": False, **changes})


def test_the_first_line_names_the_smallest_rank_and_what_it_may_cost():
    finding = find_smallest_rank(losses(0.93, 0.715, 0.71), alike(0.01))
    assert finding.chosen.params["lora.r"] == 4
    assert finding.headline.startswith(
        "r = 4 is the smallest rank that is not worse than the best (r = 8) beyond noise: loss 0.715 against 0.710, "
        "at most 0.0"
    )
    assert finding.headline.endswith(" worse (95 % confidence).")
    assert [(c.params["lora.r"], stands) for c, _, stands in finding.by_rank] == [(2, False), (4, True), (8, True)]


def test_the_first_line_says_when_the_best_stands_alone_and_when_nothing_is_told_apart():
    assert find_smallest_rank(losses(0.93, 0.85, 0.71), alike(0.01)).headline == (
        "r = 8, the largest rank with a result, is the best; "
        "every smaller rank is worse beyond noise (95 % confidence)."
    )
    assert find_smallest_rank(losses(0.93, 0.71, 0.9), alike(0.01)).headline == (
        "r = 4 is the best; every smaller rank is worse beyond noise (95 % confidence)."
    )
    tied = find_smallest_rank(losses(0.712, 0.711, 0.71), alike(0.1))
    assert tied.headline.startswith("r = 2, the smallest, is not worse than the best (r = 8) beyond noise")
    assert tied.headline.endswith("No rank is worse than the best beyond noise.")
    assert find_smallest_rank(losses(0.71, 0.72, 0.9), alike(0.1)).headline == (
        "r = 2 is the smallest rank, and no larger rank has a better mean."
    )


def test_the_first_line_does_not_call_a_rank_the_smallest_where_smaller_ones_have_no_result():
    best = find_smallest_rank(losses(None, 0.71, 0.72), alike(0.1))
    assert best.headline == "r = 4 is the smallest rank with a result, and no larger rank has a better mean."
    tied = find_smallest_rank(losses(None, 0.711, 0.71), alike(0.1))
    assert tied.headline.startswith("r = 4, the smallest with a result, is not worse than the best (r = 8)")
    larger = find_smallest_rank(losses(0.71, 0.72, None), alike(0.1))
    assert larger.headline == "r = 2 is the smallest rank, and no larger rank has a better mean."


def test_one_rank_alone_and_no_result_claim_nothing():
    only = find_smallest_rank(losses(0.7), alike(0.1))
    assert "nothing to compare it with" in only.headline
    assert only.notes == []
    assert find_smallest_rank(losses(None, None), nothing) is None


def test_without_results_of_single_examples_the_errors_of_both_count_and_the_notes_say_so():
    finding = find_smallest_rank(losses(0.93, 0.73, 0.71), nothing)
    assert not finding.verdict.paired
    assert finding.chosen.params["lora.r"] == 4
    assert any("per-example results are not stored" in note for note in finding.notes)
    assert not any("example by example" in note for note in finding.notes)


def test_with_one_seed_the_notes_say_that_its_noise_is_not_known():
    one = find_smallest_rank(losses(0.93, 0.71), alike(0.01))
    assert any("Noise over seeds is unknown" in note for note in one.notes)
    several = find_smallest_rank(seeds_and_rates(), alike(0.01))
    assert several.verdict.seeds
    assert not any("is unknown" in note for note in several.notes)
    assert several.verdict.comparisons == 7


def test_the_rule_its_confidence_and_where_it_comes_from_are_told():
    (rule, *_) = find_smallest_rank(losses(0.93, 0.9, 0.71), alike(0.01)).notes
    for wanted in ("95 %", "comparisons with the best, 2 (", "Bonferroni", "Hsu 1984", "at most 5 % of sweeps"):
        assert wanted in rule


def test_ranks_whose_arms_have_failed_or_were_pruned_are_named_as_not_judged():
    finding = find_smallest_rank(ranks(), alike(0.01))
    assert finding.unjudged == (16.0,)
    assert "Not judged, because no arm has a usable result: r = 16." in finding.notes


def test_a_greater_metric_is_judged_the_other_way():
    finding = find_smallest_rank(ranks(primary_metric="eval.token_accuracy", greater_is_better=True), nothing)
    assert finding.best.params["lora.r"] == 8
    assert " points worse (" in finding.headline or finding.chosen is finding.best
    assert finding.verdict.behind >= 0


def test_perplexity_is_judged_as_the_loss_that_it_is_a_function_of():
    assert source_of("eval.perplexity") == "eval.loss"
    assert source_of("eval.exact_match") == "eval.exact_match"
    finding = find_smallest_rank(ranks(primary_metric="eval.perplexity"), alike(0.01))
    assert finding.key == "eval.loss"
    assert finding.best.params["lora.r"] == 8


def test_a_seed_without_a_table_makes_its_configuration_unpaired():
    arms = [arm(2, 0.9), arm(4, 0.7), arm(4, 0.72, seed=1)]
    comparison = compare("x", arms, primary_metric="eval.loss", greater_is_better=False)

    def missing(asked):
        found = alike(0.01)(asked)
        return {run_id: table for run_id, table in found.items() if run_id != arms[2].run_id}

    assert not find_smallest_rank(comparison, missing).verdict.paired
    assert find_smallest_rank(comparison, alike(0.01)).verdict.paired


def test_different_examples_of_two_arms_count_as_independent():
    comparison = losses(0.93, 0.71)

    def disjoint(asked):
        found = alike(0.01)(asked)
        return {
            run_id: Influences(tuple(f"{run_id}-{name}" for name in table.ids), table.values)
            for run_id, table in found.items()
        }

    together = find_smallest_rank(comparison, alike(0.0)).verdict.margins[0]
    apart = find_smallest_rank(comparison, disjoint).verdict.margins[0]
    assert together < 1e-9
    assert apart == pytest.approx(1.645 * 0.02 * 2**0.5, rel=0.1)


def test_the_json_part_has_numbers_only_that_json_has():
    finding = find_smallest_rank(losses(0.93, 0.715, 0.71), alike(0.01))
    data = finding.to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["rank"] == 4
    assert data["confidence"] == 0.95
    assert data["comparisons"] == 2
    assert data["noise"] == {"examples": "paired", "seeds": False}
    assert len(data["not_worse"]) == 2
    unknown = replace(losses(0.9, 0.7), arms=tuple(arm(r, 1 / r, stderr=None) for r in (2, 4)))
    assert find_smallest_rank(unknown, nothing).to_json()["behind_best_at_most"] is None
