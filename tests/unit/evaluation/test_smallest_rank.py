"""The rule against synthetic truth: how often it claims something false, and whether it finds what is there."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rankwise.evaluation import smallest_rank
from rankwise.evaluation.smallest_rank import RankCandidate, judge

RANKS = (2, 4, 8, 16)


def sweep(draw, truth, *, seeds=1, examples=100, of_seeds=0.0, paired=True, ranks=RANKS, scale=None):
    """Results of configurations that met the same examples: hardness is shared, the rest is each one's own."""
    weights = draw.integers(3, 9, examples).astype(float)
    hardness = draw.normal(0.0, 1.0, examples)
    candidates, influences = [], {}
    for at, quality in enumerate(truth):
        taste, mean = draw.normal(0.0, 0.3, examples), np.zeros(examples)
        values, squares = [], []
        for _ in range(seeds):
            shift = draw.normal(0.0, of_seeds * (scale[at] if scale else 1.0))
            results = quality + shift + hardness + taste + draw.normal(0.0, 0.3, examples)
            values.append(float(weights @ results / weights.sum()))
            influence = weights * (results - values[-1]) / weights.sum()
            mean += influence / seeds
            squares.append(examples / (examples - 1) * float(influence @ influence))
        candidates.append(
            RankCandidate(rank=ranks[at], values=tuple(values), stderr=math.sqrt(np.mean(squares)), examples=examples)
        )
        influences[at] = mean if paired else None
    return candidates, lambda wanted: {at: influences[at] for at in wanted}


def rates(truth, count, **options):
    """How often a rank below the named one was as good as the best, and how often the limit was too low."""
    draw = np.random.default_rng(7)
    ranks = options.get("ranks", RANKS)
    wrong = low = 0
    named = []
    for _ in range(count):
        verdict = judge(*sweep(draw, truth, **options))
        named.append(ranks[verdict.chosen])
        wrong += any(quality >= max(truth) for quality, rank in zip(truth, ranks, strict=True) if rank < named[-1])
        low += max(truth) - truth[verdict.chosen] > verdict.at_most
    return wrong / count, low / count, named


CASES = {
    "one seed": {},
    "three seeds": {"seeds": 3, "of_seeds": 0.3},
    "unpaired": {"paired": False},
    "few examples": {"examples": 20},
    "seeds hardly matter": {"seeds": 3, "of_seeds": 0.05},
    "two seeds": {"seeds": 2, "of_seeds": 0.5},
    "unequal seeds": {"seeds": 3, "of_seeds": 0.2, "scale": (3, 1, 1, 1)},
}
TIED = (0.0, 0.0, 0.0, 0.0)


def allowed(count):
    """5 %, and three standard errors of a rate of 5 % among so many."""
    return 0.05 + 3 * math.sqrt(0.05 * 0.95 / count)


@pytest.mark.parametrize("case", list(CASES)[:3])
def test_a_rank_that_is_as_good_as_the_best_is_passed_over_in_five_percent_of_sweeps_at_most(case):
    wrong, _, _ = rates(TIED, 300, **CASES[case])
    assert wrong <= allowed(300)


@pytest.mark.proof
@pytest.mark.parametrize("case", CASES)
def test_the_rate_of_false_claims_holds_in_all_kinds_of_sweeps(case):
    wrong, _, _ = rates(TIED, 4000, **CASES[case])
    assert wrong <= allowed(4000)


MANY = tuple(rank for rank in (2, 4, 8) for _ in range(1 if rank == 2 else 12))


def test_many_configurations_do_not_make_the_claim_wrong_more_often():
    wrong, _, _ = rates((0.0,) * len(MANY), 120, ranks=MANY, examples=60)
    assert wrong <= allowed(120)


def test_without_the_correction_for_many_comparisons_the_claim_would_be_wrong_too_often():
    draw, wrong = np.random.default_rng(7), 0
    for _ in range(120):
        judged = smallest_rank._Judge(*sweep(draw, (0.0,) * len(MANY), ranks=MANY, examples=60), 0.95)
        judged._tail = 0.05
        wrong += MANY[judged.verdict().chosen] > 2
    assert wrong / 120 > allowed(120)


def test_what_is_clearly_worse_is_passed_over_and_the_limit_holds():
    truth = (-0.5, -0.25, -0.02, 0.0)
    wrong, low, named = rates(truth, 100, seeds=3, of_seeds=0.02)
    assert named.count(8) / len(named) > 0.7
    assert named.count(2) == 0
    assert wrong <= allowed(100)
    assert low <= allowed(100)


def test_results_of_single_examples_tell_more_than_error_bars():
    draw = np.random.default_rng(3)
    candidates, read = sweep(draw, (-0.2, 0.0), ranks=(2, 4))
    verdict = judge(candidates, read)
    assert (verdict.chosen, verdict.paired, verdict.comparisons) == (1, True, 1)
    blind = judge(candidates, lambda wanted: {})
    assert (blind.chosen, blind.paired) == (0, False)
    assert blind.at_most > verdict.margins[0]


def test_one_seed_says_so_and_several_widen_the_limits():
    one = judge(*sweep(np.random.default_rng(1), (0.0, 0.0, 0.0, 0.0)))
    assert not one.seeds
    assert one.comparisons == 3
    noisy = judge(*sweep(np.random.default_rng(1), (0.0, 0.0, 0.0, 0.0), seeds=3, of_seeds=1.0))
    assert noisy.seeds
    assert min(margin for margin in noisy.margins if margin) > 3 * max(one.margins)


def test_seeds_that_vary_more_than_those_of_others_count_for_themselves():
    values = [(0.0, 2.0), (0.0, 0.2), (1.0,)]
    candidates = [RankCandidate(rank=2, values=each, stderr=0.1, examples=9) for each in values]
    pooled = (2.0 + 0.02) / 2
    assert smallest_rank._seed_variances(candidates) == (pytest.approx([2.0, pooled, pooled]), 2)


def test_too_many_examples_to_read_keep_candidates_and_never_put_one_out(monkeypatch):
    ranks = tuple(range(1, 31))
    candidates, read = sweep(np.random.default_rng(5), tuple(rank / 300 for rank in ranks), ranks=ranks)
    asked = []

    def counting(wanted):
        asked.extend(wanted)
        return read(wanted)

    everything = judge(candidates, counting)
    assert sorted(set(asked)) == sorted(asked)
    assert everything.unread == 0
    monkeypatch.setattr(smallest_rank, "MOST_EXAMPLES", 0)
    monkeypatch.setattr(smallest_rank, "LEAST_ARMS", 4)
    asked.clear()
    some = judge(candidates, counting)
    assert len(asked) <= 4
    assert some.unread > 0
    assert ranks[some.chosen] <= ranks[everything.chosen]
    assert some.at_most >= everything.at_most
    assert set(everything.remaining) <= set(some.remaining)


def test_no_candidate_gives_no_verdict_and_a_single_one_is_the_best():
    assert judge([], lambda wanted: {}) is None
    alone = judge([RankCandidate(rank=8, values=(-0.5,), stderr=0.1, examples=50)], lambda wanted: {})
    assert (alone.best, alone.chosen, alone.behind, alone.at_most, alone.comparisons) == (0, 0, 0.0, 0.0, 0)


def test_noise_that_is_not_known_excludes_nothing():
    blind = [
        RankCandidate(rank=rank, values=(quality,), stderr=None, examples=1) for rank, quality in ((2, 0.0), (4, 9.0))
    ]
    verdict = judge(blind, lambda wanted: {})
    assert verdict.chosen == 0
    assert verdict.at_most == math.inf


def test_equal_results_are_equal():
    influence = np.array([0.1, -0.1])
    same = [RankCandidate(rank=rank, values=(1.0,), stderr=0.1, examples=2) for rank in (2, 4)]
    verdict = judge(same, lambda wanted: dict.fromkeys(wanted, influence))
    assert (verdict.chosen, verdict.behind, verdict.at_most) == (0, 0.0, 0.0)
