"""The answer of a comparison: what is said, what is not, and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.answers import answered
from helpers.comparisons import arm, ranks

from rankwise.evaluation.answer import Decision, RankOutcome
from rankwise.evaluation.answer_text import Answer, amount
from rankwise.evaluation.compare import compare
from rankwise.evaluation.findings import find, find_answer, source_of
from rankwise.experiment.answer_plan import AnswerPlan

TWO_LOOKS = AnswerPlan(margin=0.05, looks=(tuple(range(3)), tuple(range(6))))
RATE = "training__learning_rate"


def answer(truth, **changes) -> Answer:
    return find_answer(*answered(truth, **changes))


def statuses(found: Answer) -> dict[float, str]:
    assert found.decision is not None, found.text
    return {each.rank: each.status for each in found.decision.outcomes}


def test_the_smallest_rank_that_is_enough_is_named_with_its_limit_and_what_it_rests_on():
    found = answer({2: 0.2, 4: 0.01, 8: 0.002, 16: 0.0})
    assert statuses(found) == {2: "not_enough", 4: "enough", 8: "enough", 16: "reference"}
    assert (found.status, found.rank, found.seeds, found.rows) == ("enough", 4, 5, 90)
    assert 0.01 < found.limit < 0.05
    assert found.text == (
        f"r = 4 is enough: at most {amount('eval.loss', found.limit, up=True)} worse than r = 16 "
        "(95 % confidence; 5 seeds, 90 rows; margin 0.05)."
    )
    assert found.hint is None


def test_the_learning_rate_at_which_ranks_are_compared_is_said():
    found = answer({2: 0.0, 4: 0.0}, settings=({RATE: 0.004},))
    assert found.text.endswith("margin 0.05; learning rate 4e-3).")


def test_a_rank_that_is_better_than_the_largest_is_called_better():
    found = answer({2: -0.3, 4: 0.0})
    assert found.text.startswith("r = 2 is enough: at least 0.2")
    assert " better than r = 4 (" in found.text


def test_the_largest_alone_is_enough_and_a_larger_one_is_suggested():
    found = answer({2: 0.3, 4: 0.2, 8: 0.0})
    assert (found.status, found.rank, found.limit) == ("enough", 8, None)
    assert found.text.startswith("Only r = 8 is enough: every smaller rank is more than 0.05 nats worse (")
    assert found.text.endswith("A larger rank may be better still: try r = 16.")


def test_ranks_below_one_that_is_not_enough_are_not_called_enough():
    found = answer({2: 0.0, 4: 0.2, 8: 0.0})
    assert statuses(found) == {2: "undecided", 4: "not_enough", 8: "reference"}
    assert found.rank == 8
    assert "r = 2 is undecided: r = 4, a larger rank, is not enough." in found.hint
    assert "On average" not in found.text


def test_a_rank_that_beats_the_named_one_by_more_than_the_margin_is_mentioned():
    found = answer({2: 0.0, 4: -0.2, 8: 0.0})
    assert found.rank == 2
    assert "On average r = 4 was 0.2" in found.text or "On average r = 4 was 0.19" in found.text
    assert found.text.endswith("better than r = 2.")


def test_what_noise_leaves_open_is_undecided_with_the_seeds_that_would_decide():
    found = answer({2: 0.02, 4: 0.0}, seed_sd=0.02, seeds=range(3))
    assert (found.status, found.rank, found.limit) == ("undecided", None, None)
    assert found.text.startswith(
        "Undecided: it is open whether r = 2 is enough, compared with r = 4 (95 % confidence; "
    )
    (outcome, _) = found.decision.outcomes
    assert 3 < outcome.more_seeds < 100
    assert f"r = 2: about {outcome.more_seeds} seeds would decide." in found.hint
    assert "times the standard deviation of a difference over seeds." in found.hint
    more = answer({2: 0.02, 4: 0.0}, seed_sd=0.02, seeds=range(2 * outcome.more_seeds), draw=1)
    assert more.rank == 2


def test_few_rows_are_not_decided_by_more_seeds():
    found = answer({2: 0.03, 4: 0.0}, row_sd=0.2, rows=30)
    assert found.decision.outcomes[0].more_seeds is None
    assert "r = 2: more seeds alone will hardly decide; more evaluation rows may." in found.hint


def test_greater_metrics_are_judged_the_other_way():
    found = answer({2: 0.5, 4: 0.8}, key="eval.exact_match", greater=True)
    assert found.decision.outcomes[0].difference == pytest.approx(0.3, abs=0.05)
    assert found.text.startswith("Only r = 4 is enough: every smaller rank is more than 5 points worse (")


# No statement.


def test_without_the_section_there_is_no_statement_and_the_key_to_add_is_named():
    comparison, read = answered({2: 0.2, 4: 0.0})
    found = find_answer(replace(comparison, plan=None), read)
    assert found.text == "Ten adapters, and no margin is set: no statement about ranks. Lowest mean loss: r = 4."
    assert found.hint == "To test which rank is enough, add `answer: {margin: 0.02}` to the definition."
    assert found.to_json() | {"method": None} == {
        "status": "no_statement", "rank": None, "limit": None, "margin": None, "confidence": 0.95, "seeds": 5,
        "text": found.text, "ranks": [], "metric": "eval.loss", "rows": None, "clusters": None, "look": None,
        "looks": None, "seed_sd": None, "hint": found.hint, "method": None,
    }  # fmt: skip


def test_one_seed_is_no_statement_with_and_without_the_section():
    comparison, read = answered({2: 0.2, 4: 0.1, 8: 0.0, 16: 0.01}, seeds=(0,))
    for plan in (comparison.plan, None, TWO_LOOKS):
        found = find_answer(replace(comparison, plan=plan), read)
        assert found.text == "Four adapters, one seed each: no statement about ranks. Lowest loss: r = 8."
        assert found.hint.startswith("Another seed can change the order. ")


def test_fewer_than_twenty_effective_clusters_are_no_statement():
    few = answer({2: 0.2, 4: 0.0}, rows=60, clusters=[*[0] * 30, *range(1, 31)])
    assert few.text == (
        "No statement about ranks: 60 rows count as 3.9 independent ones (rows with equal prompts count once); at "
        "least 20 are needed. Lowest mean loss: r = 4."
    )
    assert answer({2: 0.2, 4: 0.0}, rows=19).status == "no_statement"
    assert answer({2: 0.2, 4: 0.0}, rows=20).status == "enough"


def test_confounded_ranks_cannot_be_compared():
    arms = [arm(2, 0.9, seed=seed, lora__target_modules="q_proj") for seed in (0, 1)]
    arms += [arm(4, 0.7, seed=seed, lora__target_modules="all-linear") for seed in (0, 1)]
    plan = AnswerPlan(margin=0.05, looks=((0, 1),), fixed=True)
    found = find_answer(
        compare("x", arms, primary_metric="eval.loss", greater_is_better=False, plan=plan), lambda asked: {}
    )
    assert found.text == (
        "No statement about ranks: no comparison is possible, because ranks also differ in target modules: give every "
        "rank the same values (a grid), or list fields in answer.tune. Lowest mean loss: r = 4."
    )


def test_ranks_are_compared_within_other_settings_that_all_of_them_have():
    comparison, read = answered({2: 0.01, 4: 0.0}, settings=({RATE: 1e-3}, {RATE: 2e-3}))
    # One more setting that only the larger rank has, and that is much better.
    extra = arm(4, -9.0, **{RATE: 8e-3})
    found = find_answer(replace(comparison, arms=(*comparison.arms, extra)), read)
    assert found.rank == 2
    assert "averaged over learning rate 0.001 and 0.002" in found.text
    assert any("1 combinations of other settings are left out" in note for note in found.notes)


def test_alpha_may_follow_from_the_rank_and_is_a_setting_where_it_does_not():
    assert answer({2: 0.0, 4: 0.0}).rank == 2
    two = answer({2: 0.0, 4: 0.0}, settings=({"lora__alpha": 8}, {"lora__alpha": 16}))
    assert "averaged over alpha 8 and 16" in two.text


def test_an_arm_without_readable_rows_is_named():
    comparison, read = answered({2: 0.0, 4: 0.0})
    found = find_answer(comparison, lambda asked: dict(list(read(asked).items())[1:]))
    assert "results of single rows cannot be read for 1 of 10 arms, first of the run run002000" in found.text


def test_different_rows_are_not_compared():
    comparison, read = answered({2: 0.0, 4: 0.0})

    def disjoint(asked):
        return {
            run: table._replace(ids=tuple(f"{run}-{name}" for name in table.ids)) for run, table in read(asked).items()
        }

    assert "arms were evaluated on different rows" in find_answer(comparison, disjoint).text


def test_what_is_still_to_come_is_counted():
    comparison, read = answered({2: 0.0, 4: 0.0})
    waiting = replace(comparison.arms[0], status="RUNNING", metrics={})
    found = find_answer(replace(comparison, arms=(waiting, *comparison.arms[1:])), read)
    assert found.text == (
        "No statement about ranks: 1 of 10 results are still to come. Lowest mean loss: r = "
        f"{found.text.rpartition('= ')[2]}"
    )


# Failures and early stopping.


def test_a_rank_with_failed_seeds_is_not_called_enough_and_the_share_is_said():
    found = answer({2: 0.0, 4: 0.0, 8: 0.0}, failed=[(4, 1)])
    assert statuses(found) == {2: "enough", 4: "undecided", 8: "reference"}
    assert found.decision.outcomes[1].reason.startswith("1 of 5 seeds failed; at most 10 % may")
    assert "r = 4: 1 of 5 seeds failed and are not in its mean." in found.notes
    rare = answer({2: 0.0, 4: 0.0}, seeds=range(10), failed=[(2, 3)])
    assert rare.rank == 2
    assert rare.decision.outcomes[0].seeds == 9
    assert rare.text.endswith("). 1 of 10 seeds of r = 2 failed.")


def test_a_result_that_is_not_finite_and_a_silent_arm_are_failures():
    comparison, read = answered({2: 0.0, 4: 0.0})
    first = comparison.arms[0]
    broken = {**first.metrics, "eval.loss": replace(first.metrics["eval.loss"], value=None)}
    found = find_answer(replace(comparison, arms=(replace(first, metrics=broken), *comparison.arms[1:])), read)
    assert found.decision.outcomes[0].failed == 1
    few = {**first.metrics, "eval.loss": replace(first.metrics["eval.loss"], n=3)}
    found = find_answer(replace(comparison, arms=(replace(first, metrics=few), *comparison.arms[1:])), read)
    assert found.decision.outcomes[0].failed == 1


def test_with_failed_seeds_of_the_largest_rank_nothing_is_called_not_enough():
    found = answer({2: 0.3, 4: 0.0}, failed=[(4, 1)])
    assert statuses(found)[2] == "undecided"
    assert any("no rank is called not enough" in note for note in found.notes)
    assert "the largest rank, with which others are compared, has no result" in (
        answer({2: 0.3, 4: 0.0}, failed=[(4, seed) for seed in range(5)]).text
    )


def test_pruned_ranks_are_named_and_a_pruned_reference_allows_no_statement():
    comparison, read = answered({2: 0.0, 4: 0.0, 8: 0.0})
    reason = "pruned at step 16: eval.loss 1.61 is not among the best 4 of 16"

    def pruned(rank):
        arms = [
            replace(each, status="KILLED", reason=reason, metrics={}) if each.params["lora.r"] == rank else each
            for each in comparison.arms
        ]
        return find_answer(replace(comparison, arms=tuple(arms)), read)

    middle = pruned(4)
    assert middle.rank == 2
    assert (
        "Early stopping ended arms by their evaluation on the same rows (5 pruned at step 16); the answer is about "
        "arms that were trained to the end. Nothing is said about r = 4."
    ) in middle.notes
    assert "early stopping ended r = 8, the largest rank, with which others are compared" in pruned(8).text


# Looks.


def test_the_first_look_rests_on_the_first_seeds_only_and_the_second_on_all():
    truth = {2: 0.03, 4: 0.0}
    comparison, read = answered(truth, seeds=range(6), seed_sd=0.012, plan=TWO_LOOKS, draw=3)
    first = tuple(each for each in comparison.arms if each.params["seed"] < 3)
    one = find_answer(replace(comparison, arms=first), read)
    assert (one.decision.look, one.seeds, one.status) == (1, 3, "undecided")
    assert "`rankwise run` trains up to 6 seeds." in one.hint
    # A part of the second look is no look.
    part = tuple(each for each in comparison.arms if each.params["seed"] < 5)
    assert find_answer(replace(comparison, arms=part), read).decision.outcomes == one.decision.outcomes
    two = find_answer(comparison, read)
    assert (two.decision.look, two.seeds) == (2, 6)


def test_what_the_first_look_decided_stays():
    comparison, read = answered({2: 0.3, 4: 0.0}, seeds=range(6), plan=TWO_LOOKS)
    found = find_answer(comparison, read)
    assert found.decision.look == 1
    assert found.decision.outcomes[0].seeds == 3


def test_one_look_has_the_whole_error_and_two_share_it():
    one = answer({2: 0.01, 4: 0.0}, seeds=range(3), plan=AnswerPlan(margin=0.05, looks=((0, 1, 2),)))
    two = answer({2: 0.01, 4: 0.0}, seeds=range(3), plan=TWO_LOOKS)
    assert one.decision.outcomes[0].upper < two.decision.outcomes[0].upper


# Tuning.

TUNED = AnswerPlan(margin=0.05, tune=("training.learning_rate",), pilot=(0, 1), looks=((2, 3, 4, 5),))


def tuned(plan=TUNED, **changes):
    """The smaller rank needs the larger learning rate."""
    comparison, read = answered({2: 0.0, 4: 0.0}, seeds=range(6), settings=({RATE: 1e-3}, {RATE: 4e-3}), plan=plan)
    arms = []
    for each in comparison.arms:
        worse = 0.4 if (each.params["lora.r"] == 2) == (each.params["training.learning_rate"] == 1e-3) else 0.0
        loss = each.metrics["eval.loss"]
        metrics = {**each.metrics, "eval.loss": replace(loss, value=loss.value + worse)}
        arms.append(replace(each, metrics=metrics))
    return replace(comparison, arms=tuple(arms), **changes), read


def test_each_rank_is_compared_at_the_values_that_pilot_seeds_chose():
    found = find_answer(*tuned())
    assert found.rank == 2
    assert found.seeds == 4
    assert found.text.endswith("each rank at its own best learning rate).")
    assert any("Chosen by the pilot seeds 0 and 1" in n and "r = 2: learning rate 4e-3; r = 4: learning rate 1e-3" in n
               for n in found.notes)  # fmt: skip
    assert [each["tuned"] for each in found.to_json()["ranks"]] == [
        {"training.learning_rate": 4e-3}, {"training.learning_rate": 1e-3},
    ]  # fmt: skip


def test_only_the_chosen_values_need_the_fresh_seeds():
    comparison, read = tuned()
    kept = [
        each for each in comparison.arms
        if each.params["seed"] < 2 or (each.params["lora.r"] == 2) == (each.params["training.learning_rate"] == 4e-3)
    ]  # fmt: skip
    assert find_answer(replace(comparison, arms=tuple(kept)), read).rank == 2


def test_after_the_pilot_seeds_the_fresh_ones_are_still_to_come():
    comparison, read = tuned()
    pilot = tuple(each for each in comparison.arms if each.params["seed"] < 2)
    found = find_answer(replace(comparison, arms=pilot), read)
    assert found.text.startswith("No statement about ranks: 8 of 8 results are still to come.")


def test_pilot_seeds_must_have_ended_and_there_must_be_some():
    comparison, read = tuned()
    fresh = tuple(each for each in comparison.arms if each.params["seed"] != 1)
    cut = find_answer(replace(comparison, arms=fresh), read)
    assert cut.rank == 2  # One pilot seed is left.
    none = tuple(each for each in comparison.arms if each.params["seed"] > 1)
    assert "pilot seeds of learning rate are still to be trained" in (
        find_answer(replace(comparison, arms=none), read).text
    )
    plan = AnswerPlan(margin=0.05, tune=TUNED.tune, looks=((0, 1),), fixed=True)
    assert "learning rate is tuned, which needs pilot seeds" in find_answer(*tuned(plan)).text


# Forms.


def test_the_json_part_is_what_is_promised():
    data = answer({2: 0.2, 4: 0.01, 8: 0.0}).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert {key: data[key] for key in ("status", "rank", "margin", "confidence", "seeds")} == {
        "status": "enough", "rank": 4, "margin": 0.05, "confidence": 0.95, "seeds": 5,
    }  # fmt: skip
    assert [(each["r"], each["status"]) for each in data["ranks"]] == [
        (2, "not_enough"), (4, "enough"), (8, "reference"),
    ]  # fmt: skip
    two, four, reference = data["ranks"]
    assert two["lower"] > 0.05
    assert four["lower"] < four["difference"] < four["upper"] == data["limit"] < 0.05
    assert (reference["difference"], reference["lower"], reference["upper"]) == (0.0, None, None)


def test_a_plan_that_was_changed_after_the_first_submission_is_said():
    comparison, read = answered({2: 0.0, 4: 0.0})
    for earlier, before in ((None, "not set"), (AnswerPlan(margin=0.01), "0.01")):
        found = find_answer(replace(comparison, earlier_plans=(earlier,)), read)
        assert f"changed once after the sweep was first submitted (before, the margin was {before})" in found.hint


def test_configurations_behind_the_named_rank_are_marked():
    comparison, read = answered({2: 0.0, 4: 0.0})
    assert [each.params["lora.r"] for each in find(comparison, read).chosen] == [2]
    assert find(ranks(), read).chosen == ()


def test_perplexity_is_shown_as_the_loss_that_it_is_a_function_of():
    assert source_of("eval.perplexity") == "eval.loss"
    assert source_of("eval.exact_match") == "eval.exact_match"


@pytest.mark.parametrize(
    ("key", "value", "up", "text"),
    [
        ("eval.loss", 0.0512, True, "0.052 nats"),
        ("eval.loss", 0.0512, None, "0.051 nats"),
        ("eval.loss", 0.05, True, "0.05 nats"),
        ("eval.exact_match", 0.0123, False, "1.2 points"),
        ("eval.mean_absolute_error", 134.2, True, "135"),
        ("eval.loss", 0.0, None, "0 nats"),
    ],
)
def test_amounts_have_two_digits_and_limits_are_rounded_to_the_safe_side(key, value, up, text):
    assert amount(key, value, up=up) == text


def test_the_named_rank_waits_for_undecided_ranks_unless_they_are_blocked():
    def named(*outcomes):
        given = [RankOutcome(rank=2.0**at, status=status, blocked=blocked)
                 for at, (status, blocked) in enumerate(outcomes)]  # fmt: skip
        reference = RankOutcome(rank=64, status="reference")
        decision = Decision(
            outcomes=(*given, reference), look=1, looks=1, seed_sd=1, beyond_most=(), narrowing=(), pooled=True
        )
        return None if decision.named is None else decision.named.rank

    assert named(("undecided", False), ("enough", False)) == 2
    assert named(("undecided", False), ("not_enough", False)) is None
    assert named(("undecided", True), ("not_enough", False)) == 64
