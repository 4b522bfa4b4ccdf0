from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rankwise.evaluation.gate import GateDecision, decide, left, spent
from rankwise.evaluation.metrics import Observation, Sample
from rankwise.evaluation.paired import paired_difference
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import PromotionSpec

METRICS = ("loss", "token_accuracy", "number")


def observations(loss, *, n=200, right=5, price=1000, seed=0):
    """Examples of ten tokens with about `loss` nats each; noise is the example's own, so that models are paired."""
    noise = np.random.default_rng(7).normal(0, 0.5, n) + np.random.default_rng(seed).normal(0, 0.05, n)
    return [
        Observation(
            id=str(at), prompt=f"p{at}", reference="1000", loss_sum=10 * (loss + noise[at]), tokens=10,
            correct_tokens=right, prediction=str(price),
        )
        for at in range(n)
    ]  # fmt: skip


def weigh(
    candidate,
    champion,
    base,
    *,
    overlapping=0,
    primary="eval.loss",
    same_tokens=True,
    contenders=1,
    attempt=1,
    **limits,
):
    return decide(
        candidate, champion, base, PromotionSpec(**limits), metrics=METRICS, primary_metric=primary,
        overlapping=overlapping, same_tokens=same_tokens, contenders=contenders, attempt=attempt,
    )  # fmt: skip


BASE = observations(5.0, seed=1)


def test_a_candidate_that_is_better_beyond_noise_passes():
    decision = weigh(observations(1.9, seed=2), observations(2.0, seed=3), BASE)
    assert decision.passed
    assert decision.reasons == ()
    assert [(check.name, check.against) for check in decision.checks] == [
        ("examples", None), ("overlap", None), ("improvement", "champion"), ("improvement", "base")
    ]  # fmt: skip


def test_a_candidate_that_is_better_within_noise_does_not():
    decision = weigh(observations(2.0, seed=2), observations(2.001, seed=3), BASE)
    (reason,) = decision.reasons
    assert reason.startswith("eval.loss against the champion: ")
    assert reason.endswith("(n = 200); must be better by more than 0")


def test_an_improvement_must_be_as_large_as_asked_for():
    better, champion = observations(1.9, seed=2), observations(2.0, seed=3)
    assert weigh(better, champion, BASE, min_improvement=0.05).passed
    assert not weigh(better, champion, BASE, min_improvement=0.1).passed


def test_the_first_candidate_has_only_the_base_to_beat():
    assert weigh(observations(2.0), None, BASE).passed
    assert not weigh(observations(5.5), None, BASE).passed


def test_where_more_is_better_less_is_no_improvement():
    base, champion = observations(5.0, right=1), observations(2.0, right=5)
    assert weigh(observations(2.0, right=7), champion, base, primary="eval.token_accuracy").passed
    assert not weigh(observations(2.0, right=4), champion, base, primary="eval.token_accuracy").passed


def test_another_metric_may_not_get_worse_than_its_limit():
    champion = observations(2.0, price=1010, seed=3)
    worse = observations(1.5, price=1100, seed=2)
    limits = {"max_regression": {"eval.mean_absolute_error": 50}}
    assert weigh(worse, champion, BASE).passed
    (reason,) = weigh(worse, champion, BASE, **limits).reasons
    assert reason == (
        "eval.mean_absolute_error against the champion: +90 [+90, +90] (n = 200); may be worse by at most 50"
    )
    assert weigh(worse, champion, BASE, max_regression={"eval.mean_absolute_error": 90}).passed
    assert weigh(observations(1.5, price=1000), champion, BASE, **limits).passed


def test_what_is_not_defined_does_not_pass():
    champion, silent = observations(2.0, price=1010), observations(1.5, price="nothing")
    limits = {"max_regression": {"eval.mean_absolute_error": 1e9}}
    silence, reason = weigh(silent, champion, BASE, **limits).reasons
    assert silence.startswith("eval.mean_absolute_error has a value for 0 of 200 answers of the candidate, and for 200")
    assert reason.startswith("eval.mean_absolute_error against the champion: not defined (n = 0)")


def test_too_few_examples_and_too_many_that_were_trained_on():
    few = [observations(loss, n=20) for loss in (1.0, 2.0, 5.0)]
    assert weigh(*few).reasons == ("20 examples; at least 100 are required",)
    assert weigh(*few, min_examples=20, overlapping=2).passed
    assert weigh(*few, min_examples=20, overlapping=5).reasons == (
        "5 of 25 examples (20.0%) were in the candidate's training data and are left out; at most 10.0% are allowed",
    )


def test_perplexity_is_decided_by_the_loss():
    decision = weigh(observations(1.5), observations(2.0), BASE, primary="eval.perplexity")
    assert {check.metric for check in decision.checks if check.metric} == {"eval.loss"}


def test_a_key_that_no_metric_gives_is_refused():
    with pytest.raises(
        ConfigError, match=r"promotion: eval\.bleu is not a mean of the metrics loss, token_accuracy, number"
    ):
        weigh(BASE, None, BASE, max_regression={"eval.bleu": 1})


def test_the_evidence_is_plain_data():
    import json

    document = weigh(observations(1.9), observations(2.0), BASE).to_json()
    assert document["passed"] is True
    assert document["checks"][2]["difference"]["n"] == 200
    assert json.loads(json.dumps(document)) == json.loads(json.dumps(document))


def test_what_was_trained_on_must_be_known():
    decision = weigh(observations(1.9, seed=2), observations(2.0, seed=3), BASE, overlapping=None)
    (reason,) = decision.reasons
    assert reason == "the rows that the candidate was trained on are unknown, so none was left out"


def test_over_bases_that_cut_texts_otherwise_only_metrics_of_texts_compare():
    better, champion = observations(1.9, price=1000, seed=2), observations(2.0, price=1010, seed=3)
    (reason,) = weigh(better, champion, BASE, same_tokens=False).reasons
    assert reason.startswith(
        "eval.loss is per token, and the bases of candidate and champion tokenize texts differently"
    )
    worse_base = observations(5.0, price=1500, seed=1)
    by_texts = {"same_tokens": False, "metric": "eval.mean_absolute_error"}
    assert weigh(better, champion, worse_base, **by_texts).passed
    assert len(weigh(better, champion, worse_base, max_regression={"eval.loss": 1.0}, **by_texts).reasons) == 1
    # With nobody to compare with, the candidate and its own base share a tokenizer.
    assert weigh(better, None, BASE, same_tokens=False).passed


def talking(spoken, *, n=200, error=100):
    """Predictions that are `error` off; examples that are not in `spoken` have an answer without a number."""
    return [
        replace(each, prediction=str(1000 + error) if at in spoken else "I do not know")
        for at, each in enumerate(observations(2.0, n=n))
    ]


def test_nobody_wins_by_silence():
    by_price = {"primary": "eval.mean_absolute_error"}
    champion, base = talking(range(200)), talking(range(200), error=500)
    assert weigh(talking(range(200), error=0), champion, base, **by_price).passed
    # Three answers without any error, and 197 times nothing.
    refused = weigh(talking(range(3), error=0), champion, base, **by_price).reasons
    assert refused[0] == (
        "eval.mean_absolute_error has a value for 3 of 200 answers of the candidate, and for 200 of the champion; at "
        "least 100 are required, and not fewer than the champion has, beyond noise"
    )
    # Enough of them, and yet a fifth that the champion has answered.
    assert not weigh(talking(range(160), error=0), champion, base, **by_price).passed
    # As often as the champion, by noise, on other examples; and a base that says nothing costs the candidate nothing.
    assert weigh(talking(range(10, 200), error=0), talking(range(190)), base, **by_price).passed
    assert weigh(talking(range(200), error=0), champion, talking(range(30), error=500), **by_price).passed


def test_examples_with_one_prompt_are_one_measurement():
    few = [observations(loss, n=20, seed=seed) for loss, seed in ((1.99, 1), (2.0, 2), (5.0, 3))]
    copies = [[replace(each, id=f"{each.id}.{copy}") for each in side for copy in range(10)] for side in few]
    assert weigh(*copies).reasons[0] == "200 examples with 20 different prompts; at least 100 are required"
    once, ten = (weigh(*sides, min_examples=20).checks[2].difference for sides in (few, copies))
    assert (ten.n, ten.clusters, once.clusters) == (200, 20, 20)
    assert (ten.low, ten.high) == pytest.approx((once.low, once.high))
    assert "(n = 200 in 20 clusters)" in weigh(*copies).checks[2].text


def test_one_example_shows_nothing():
    one = [observations(loss, n=1) for loss in (1.0, 2.0, 5.0)]
    decision = weigh(*one, min_examples=1)
    assert not decision.passed
    assert decision.reasons[0].startswith("eval.loss against the champion: -1 no interval (n = 1)")


def best_of(count, draw):
    """The luckiest of equal arms, as the comparison chooses it, and their equal champion."""
    losses = draw.normal(2.0, 0.3, (count, 100))
    best = losses[np.argmin(losses.mean(axis=1))]
    champion, hopeless = draw.normal(2.0, 0.3, 100), np.full(100, 9.0)
    return [
        [
            Observation(id=str(at), prompt=str(at), reference="", loss_sum=loss, tokens=1, correct_tokens=0)
            for at, loss in enumerate(side)
        ]
        for side in (best, champion, hopeless)
    ]


def rate_of_false_promotions(contenders, trials, arms=16):
    """How often the luckiest of equal arms passes."""
    draw = np.random.default_rng(3)
    return np.mean([weigh(*best_of(arms, draw), contenders=contenders).passed for _ in range(trials)])


def test_the_luckiest_of_many_equal_arms_is_not_promoted_for_its_luck():
    # One sided, 2.5 % are promised; three standard errors of counting on top.
    assert rate_of_false_promotions(16, 100) <= 0.025 + 3 * (0.025 * 0.975 / 100) ** 0.5
    assert rate_of_false_promotions(1, 40) > 0.1


def test_the_choice_among_many_is_said():
    decision = weigh(observations(1.9, seed=2), observations(2.0, seed=3), BASE, contenders=10)
    (chosen,) = [check for check in decision.checks if check.name == "chosen"]
    assert decision.passed
    assert (
        "is one of 10 arms that were compared on these rows, so intervals are at confidence 0.995 instead of 0.95"
        in chosen.text
    )
    alone = weigh(observations(1.9, seed=2), observations(2.0, seed=3), BASE).checks[2].difference
    among = decision.checks[3].difference
    assert (among.low, among.high) != (alone.low, alone.high)
    assert among.low < alone.low < alone.high < among.high


def test_all_attempts_together_spend_no_more_than_twice_the_first_one():
    assert spent(0.05, 1) == 0.05
    assert sum(spent(0.05, attempt) for attempt in range(1, 100_000)) == pytest.approx(0.1, rel=1e-4)
    for attempt in (1, 2, 7):
        used = sum(spent(0.05, each) for each in range(1, attempt + 1)) / 2
        assert used + left(0.05, attempt) == pytest.approx(0.05)


def test_repeated_attempts_are_reported_and_widen_the_intervals():
    sides = observations(1.9, seed=2), observations(2.0, seed=3), BASE
    first, third = weigh(*sides), weigh(*sides, attempt=3)
    (attempts,) = [check for check in third.checks if check.name == "attempts"]
    assert attempts.text.startswith(
        "this is attempt 3 on these rows for @champion, so intervals are at confidence 0.99167 instead of 0.95; of the "
        "0.05 for a false pass, 0.00833 is left for further attempts"
    )
    assert not [check for check in first.checks if check.name == "attempts"]
    narrow, wide = first.checks[2].difference, third.checks[3].difference
    assert wide.low < narrow.low < narrow.high < wide.high


def test_a_decision_survives_json():
    decision = weigh(observations(1.9, seed=2), None, BASE, attempt=2)
    assert GateDecision.from_json(json.loads(json.dumps(decision.to_json()))) == decision


def families_with_a_false_pass(trials, tried, attempts):
    """How many of some families of equal candidates, tried in turn on the same 60 rows, have one that passes."""
    draw = np.random.default_rng(5)
    confidences = [1 - spent(0.05, attempt) if attempts else 0.95 for attempt in range(1, tried + 1)]
    wrong = 0
    for _ in range(trials):
        # Each row is as hard for all models; the rest is luck. The champion is the same in every attempt.
        hard, own = draw.normal(2.0, 1.0, 60), draw.normal(0.0, 0.3, (tried + 1, 60))
        champion, *candidates = ([Sample(total=loss) for loss in hard + luck] for luck in own)
        for confidence, candidate in zip(confidences, candidates, strict=True):
            found = paired_difference(candidate, champion, confidence=confidence)
            if found.high < 0:
                wrong += 1
                break
    return wrong


@pytest.mark.proof
def test_of_twenty_equal_candidates_in_turn_one_passes_in_at_most_five_percent():
    trials = 400
    wrong = families_with_a_false_pass(trials, 20, True)
    assert wrong <= 0.05 * trials + 2 * (0.05 * 0.95 * trials) ** 0.5, wrong
    assert families_with_a_false_pass(100, 20, False) >= 10
