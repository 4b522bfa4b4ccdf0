"""The smallest rank that is not worse than the best one beyond noise, by a multiple comparison with the best.

A configuration is *excluded* if the one with the best mean beats it: its own mean is worse by more than c * se, where
se is the standard error of the difference of both and c the one-sided critical value of Student's t at confidence
1 - alpha / (K - 1), with K configurations that have a result (Bonferroni: valid whatever the dependence between
results). So the best configuration is excluded with probability alpha at most, whatever K is and whichever one looks
best (subset selection, Gupta 1965, *Technometrics* 7, 225; multiple comparison with the best, Hsu 1984, *Annals of
Statistics* 12, 1136). The answer is the smallest rank with a configuration that is not excluded. With confidence
1 - alpha

- no configuration of a smaller rank is as good as the best one, and
- the named one is worse than the best by at most `Verdict.at_most` (the largest upper limit of its differences to all
  that are not excluded; Edwards and Hsu 1983, *JASA* 78, 965: both statements hold together, at one confidence).

Noise has two sources.

- Examples: all configurations were evaluated on the same ones, so the error is that of paired differences (linearised,
  with examples as units and equal prompts as one; `metrics.weighted_mean` has the formula). Without per-example
  results, both errors are treated as independent. That is too large if the same examples are hard for both adapters,
  as is usual.
- Seeds: the variance between seeds of one configuration, pooled over all, or its own if that is larger. With one seed
  each it is unknown, and the claim holds for these adapters only, not for others of the same settings.

The variances are added (the second includes some of the first, so the sum is conservative). The critical value is the
mean of those of both sources, weighted by their variances (Cochran 1964, *Biometrics* 20, 191), since few seeds give
few degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from rankwise.evaluation.compare import RANK, ArmRecord, Comparison, Configuration, format_param, format_value, title
from rankwise.evaluation.gather import Influences, read_influences
from rankwise.evaluation.metrics import find_metrics
from rankwise.exceptions import ConfigError, TrackingError
from rankwise.experiment.metric_names import greater_is_better, known_names, metric_facts

if TYPE_CHECKING:
    from rankwise.tracking.store import Store

CONFIDENCE = 0.95
# Results of single examples are read for no more than this many examples of all arms together, but for this many arms
# at least: 200 examples of 1,250 arms, or 2,500 of 100.
MOST_EXAMPLES = 250_000
LEAST_ARMS = 48
_AT_ONCE = 24


@dataclass(frozen=True, kw_only=True)
class RankCandidate:
    """The results of one configuration, greater is better (a loss comes with its sign turned).

    Attributes:
        rank: Its r.
        values: One for each seed.
        stderr: Over the examples, of one seed (root of the mean square over the seeds); None where it is not known.
        examples: How many; 0 where that is not known.
    """

    rank: float
    values: tuple[float, ...]
    stderr: float | None
    examples: int

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return math.fsum(self.values) / len(self.values)


Influence = NDArray[np.float64]
"""(n,): how much each example moves a configuration's mean: weight * (value - mean) / sum of weights, over seeds."""

Read = Callable[[Sequence[int]], Mapping[int, Influence | None]]
"""Reads influences of candidates by index; None where there are none. An example has the same place in all arrays, and
those that a shorter one does not reach have no influence on it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The conclusion about ranks.

    Attributes:
        best: Index of the candidate with the best mean.
        chosen: Index of the best candidate of the smallest rank that is not excluded.
        remaining: Indices that are not excluded, ascending.
        behind: By how much the chosen one's mean is worse than the best one's, 0 or more.
        at_most: Upper confidence limit of how much worse than the best it is; infinite if the noise is unknown.
        confidence: Of all statements together.
        comparisons: K - 1.
        paired: Whether the examples' noise is that of paired differences for every comparison that mattered.
        seeds: Whether the noise over seeds is known.
        unread: Candidates kept without reading their examples, since there were too many.
        means: Of all candidates.
        margins: Of all candidates, critical value times standard error of their difference to the best.
    """

    best: int
    chosen: int
    remaining: tuple[int, ...]
    behind: float
    at_most: float
    confidence: float
    comparisons: int
    paired: bool
    seeds: bool
    unread: int
    means: tuple[float, ...]
    margins: tuple[float, ...]


def judge(candidates: Sequence[RankCandidate], read: Read, *, confidence: float = CONFIDENCE) -> Verdict | None:
    """Find the smallest rank that is not worse than the best beyond noise; None without candidates.

    Args:
        candidates: One for each configuration that has a result.
        read: Called with the indices of candidates whose per-example results are needed, a few times.
        confidence: Of all statements together, in (0.5, 1).
    """
    if not candidates:
        return None
    return _Judge(candidates, read, confidence).verdict()


class _Judge:
    def __init__(self, candidates: Sequence[RankCandidate], read: Read, confidence: float) -> None:
        self._all = candidates
        self._read = read
        self._confidence = confidence
        self._means = np.array([each.mean for each in candidates])
        self._best = int(np.argmax(self._means))
        self._influences: dict[int, Influence | None] = {}
        self._arms = self._read_examples = 0
        self._tail = (1 - confidence) / max(1, len(candidates) - 1)
        self._variances, self._freedom = _seed_variances(candidates)

    def verdict(self) -> Verdict:
        order = sorted(range(len(self._all)), key=lambda i: (self._all[i].rank, -self._means[i]))
        # Both errors added is the error of a difference at its largest, so what falls here falls in pairs too.
        remaining = [i for i in order if not self._beaten(i, self._far)]
        self._look_at([self._best])
        if self._influences[self._best] is None:  # Then no difference to it is one of pairs.
            self._influences = dict.fromkeys(order)
        remaining = self._until_one_stands(remaining)
        self._look_at(sorted(remaining, key=lambda i: -self._means[i]))
        remaining = [i for i in remaining if not self._beaten(i)]
        chosen = remaining[0]
        # For the margins that are shown: the best of each rank, also where error bars were enough to put it out.
        self._look_at([next(i for i in order if self._all[i].rank == rank) for rank in {c.rank for c in self._all}])
        limits = [self._means[j] - self._means[chosen] + self._limit(chosen, j) for j in remaining if j != chosen]
        mattered = {self._best, chosen}
        return Verdict(
            best=self._best,
            chosen=chosen,
            remaining=tuple(sorted(remaining)),
            behind=float(self._means[self._best] - self._means[chosen]),
            at_most=max([0.0, *map(float, limits)]),
            confidence=self._confidence,
            comparisons=len(self._all) - 1,
            paired=all(self._influences.get(i) is not None for i in mattered),
            seeds=self._freedom > 0,
            unread=sum(i not in self._influences for i in remaining),
            means=tuple(map(float, self._means)),
            margins=tuple(0.0 if i == self._best else self._limit(i, self._best) for i in range(len(self._all))),
        )

    def _until_one_stands(self, remaining: Sequence[int]) -> list[int]:
        """Look at candidates by rank, best first, until one is not beaten: what is beaten before it is left out."""
        kept: list[int] = []
        for start in range(0, len(remaining), _AT_ONCE):
            part = remaining[start : start + _AT_ONCE]
            self._look_at(part)
            kept += [i for i in part if not self._beaten(i)]
            if kept:
                return [*kept, *remaining[start + _AT_ONCE :]]
        return kept

    def _look_at(self, indices: Sequence[int]) -> None:
        allowed: list[int] = []
        for i in indices:
            if i in self._influences:
                continue
            arms, examples = len(self._all[i].values), len(self._all[i].values) * self._all[i].examples
            if self._arms + arms <= LEAST_ARMS or self._read_examples + examples <= MOST_EXAMPLES or not self._arms:
                self._arms, self._read_examples = self._arms + arms, self._read_examples + examples
                allowed.append(i)
        if allowed:
            found = self._read(allowed)
            self._influences |= {i: found.get(i) for i in allowed}

    def _beaten(self, i: int, error: Callable[[int, int], float] | None = None) -> bool:
        return i != self._best and self._means[self._best] - self._means[i] > self._limit(i, self._best, error)

    def _limit(self, i: int, j: int, error: Callable[[int, int], float] | None = None) -> float:
        """Critical value times standard error of the difference of two candidates."""
        of_examples = (error or self._error)(i, j) ** 2
        of_seeds = sum(self._variances[k] / len(self._all[k].values) for k in (i, j))
        total = of_examples + of_seeds
        if not math.isfinite(total) or total == 0:
            return total
        # Examples with one prompt have one influence.
        n = min(
            *(self._all[k].examples for k in (i, j)),
            *(len(a) for k in (i, j) if (a := self._influences.get(k)) is not None),
        )
        critical = of_examples * self._student(n - 1) + of_seeds * self._student(self._freedom)
        return critical / math.sqrt(total)

    def _student(self, freedom: int) -> float:
        """The critical value; the normal one where there is nothing to count degrees of freedom by."""
        return float(stdtrit(freedom if freedom > 0 else 1e9, 1 - self._tail))

    def _far(self, i: int, j: int) -> float:
        errors = [self._all[k].stderr for k in (i, j)]
        return sum(math.inf if error is None else error for error in errors)

    def _error(self, i: int, j: int) -> float:
        """Standard error over the examples of a difference: in pairs, else as if independent."""
        if i not in self._influences or j not in self._influences:
            return self._far(i, j)
        a, b = self._influences[i], self._influences[j]
        if a is not None and b is not None:
            n = max(len(a), len(b))
            difference = np.pad(a, (0, n - len(a))) - np.pad(b, (0, n - len(b)))
            return float(np.sqrt(np.sum(difference**2) * n / (n - 1))) if n > 1 else math.inf
        errors = [self._all[k].stderr for k in (i, j)]
        return math.inf if None in errors else math.hypot(*(error or 0.0 for error in errors))


def _seed_variances(candidates: Sequence[RankCandidate]) -> tuple[list[float], int]:
    """Of each candidate, the variance over seeds that counts; and the degrees of freedom, 0 where it is not known."""
    own = [float(np.var(each.values, ddof=1)) if len(each.values) > 1 else None for each in candidates]
    freedom = sum(len(each.values) - 1 for each in candidates)
    if not freedom:
        return [0.0] * len(candidates), 0
    squares = sum(v * (len(each.values) - 1) for v, each in zip(own, candidates, strict=True) if v is not None)
    pooled = squares / freedom
    return [pooled if v is None else max(v, pooled) for v in own], freedom


RULE = (
    "multiple comparison with the best: one-sided tests of differences at confidence 1 - alpha / (K - 1), "
    "K configurations (Hsu 1984; Gupta 1965)"
)


@dataclass(frozen=True, kw_only=True)
class RankFinding:
    """The answer for one comparison.

    Attributes:
        key: The metric that was judged: the primary one, or the mean that it is a function of.
        configurations: Those that were judged, in the order of the verdict's indices.
        verdict: What came out.
        greater_is_better: Of `key`.
        unjudged: Ranks without any result.
        problem: Why results of single examples could not be read; they count as missing then.
    """

    key: str
    configurations: tuple[Configuration, ...]
    verdict: Verdict
    greater_is_better: bool
    unjudged: tuple[float, ...]
    problem: str | None = None

    @property
    def chosen(self) -> Configuration:
        """The best configuration of the smallest rank that is not worse than the best."""
        return self.configurations[self.verdict.chosen]

    @property
    def best(self) -> Configuration:
        """The configuration with the best mean."""
        return self.configurations[self.verdict.best]

    @cached_property
    def remaining(self) -> frozenset[int]:
        """`id` of the configurations that are not excluded."""
        return frozenset(id(self.configurations[i]) for i in self.verdict.remaining)

    @property
    def by_rank(self) -> list[tuple[Configuration, float, bool]]:
        """The best configuration of each rank, smallest first; c * se of its difference to the best; whether it stands.

        A rank stands when any of its configurations does: then the best one of those is given.
        """
        places: dict[float, list[int]] = {}
        for index, configuration in enumerate(self.configurations):
            places.setdefault(rank_of(configuration), []).append(index)
        remaining = set(self.verdict.remaining)
        rows = []
        for rank in sorted(places):
            standing = [i for i in places[rank] if i in remaining]
            best = max(standing or places[rank], key=lambda i: self.verdict.means[i])
            rows.append((self.configurations[best], self.verdict.margins[best], bool(standing)))
        return rows

    @property
    def headline(self) -> str:
        """The first line of the report."""
        rank, best = format_param(self.chosen.params[RANK]), format_param(self.best.params[RANK])
        percent = f"{100 * self.verdict.confidence:g} %"
        if len(self.by_rank) == 1:
            return f"r = {rank} is the only rank with a result, so there is nothing to compare it with."
        if not math.isfinite(self.verdict.at_most):
            return f"r = {best} has the best mean; the noise is unknown, and so is how much worse the others are."
        smallest = min(rank_of(each) for each in self.configurations)
        with_result = " with a result" if any(rank < smallest for rank in self.unjudged) else ""
        if self.chosen is self.best:
            if rank_of(self.chosen) == smallest:
                return f"r = {rank} is the smallest rank{with_result}, and no larger rank has a better mean."
            largest = rank_of(self.chosen) == max(rank_of(each) for each in self.configurations)
            which = ", the largest rank with a result," if largest else ""
            return f"r = {rank}{which} is the best; every smaller rank is worse beyond noise ({percent} confidence)."
        difference = (
            f"{title(self.key)} {self._mean(self.chosen)} against {self._mean(self.best)}, at most "
            f"{self.amount(self.verdict.at_most)} worse ({percent} confidence)"
        )
        if rank_of(self.chosen) > smallest:
            named = f"r = {rank} is the smallest rank that is not worse than the best (r = {best}) beyond noise"
            return f"{named}: {difference}."
        any_worse = any(not stands for _, _, stands in self.by_rank)
        end = "" if any_worse else " No rank is worse than the best beyond noise."
        same = "another configuration of this rank" if rank == best else f"r = {best}"
        return (
            f"r = {rank}, the smallest{with_result}, is not worse than the best ({same}) beyond noise: "
            f"{difference}.{end}"
        )

    @property
    def notes(self) -> list[str]:
        """What a reader must know to trust the first line."""
        verdict, count = self.verdict, len(self.configurations)
        if count == 1:
            return []
        notes = [
            f"Rule: a configuration is excluded if its mean {title(self.key)} is worse than the best one's by more "
            f"than the one-sided {100 * verdict.confidence:g} % limit of their difference, corrected for the number of "
            f"comparisons with the best, {verdict.comparisons:,} (Bonferroni; Gupta 1965, Hsu 1984). The configuration "
            f"that is really the best is excluded in at most {100 * (1 - verdict.confidence):g} % of sweeps."
        ]
        if verdict.paired:
            notes.append(
                f"Noise over examples: every configuration was evaluated on the same {self._examples:,} examples, and "
                "differences are taken example by example."
            )
        else:
            notes.append(
                "Noise over examples: per-example results are not stored for all configurations, so the errors of both "
                "are treated as independent. That is too large if the same examples are hard for both adapters."
            )
        if self.problem:
            notes.append(f"Per-example results could not be read: {self.problem}")
        if verdict.seeds:
            notes.append(
                "Noise over seeds: the variance between seeds of one configuration, pooled over all configurations, or "
                "its own if that is larger."
            )
        else:
            notes.append(
                "Noise over seeds is unknown: every configuration has one seed. The claim is about these adapters; "
                "training with another seed may change their order. To measure it, give sweep.parameters.seed two or "
                "more values."
            )
        if verdict.unread:
            notes.append(
                f"{verdict.unread:,} configurations are close to the best and were kept without reading their "
                "per-example results; this can only make the named rank smaller and the limit larger."
            )
        if self.unjudged:
            ranks = ", ".join(format_param(rank) for rank in self.unjudged)
            notes.append(f"Not judged, because no arm has a usable result: r = {ranks}.")
        return notes

    def to_json(self) -> dict[str, object]:
        """The additional part of `compare --json`."""
        verdict = self.verdict
        return {
            "rank": self.chosen.params[RANK],
            "spec_hashes": [arm.spec_hash for arm in self.chosen.finished],
            "metric": self.key,
            "behind_best": verdict.behind,
            "behind_best_at_most": verdict.at_most if math.isfinite(verdict.at_most) else None,
            "confidence": verdict.confidence,
            "comparisons": verdict.comparisons,
            "noise": {"examples": "paired" if verdict.paired else "independent", "seeds": verdict.seeds},
            "not_worse": [
                arm.spec_hash for i in verdict.remaining for arm in self.configurations[i].finished
            ],
            "not_looked_at": verdict.unread,
            "rule": RULE,
            "text": self.headline,
        }  # fmt: skip

    @property
    def _examples(self) -> int:
        return max(arm.metrics[self.key].n for arm in self.best.finished if self.key in arm.metrics)

    def _mean(self, configuration: Configuration) -> str:
        mean = configuration.metric(self.key)
        assert mean is not None
        return format_value(self.key, mean.value, mean.stderr)[0]

    def amount(self, difference: float) -> str:
        """A difference, in the metric's own form, with two digits of its own."""
        _, text = format_value(self.key, 1.0, difference)
        return text + (" points" if format_value(self.key, 1.0)[0].endswith("%") else "")


def rank_of(configuration: Configuration) -> float:
    """Its r."""
    rank = configuration.params[RANK]
    assert isinstance(rank, int | float)
    return float(rank)


ReadExamples = Callable[[Sequence[ArmRecord]], Mapping[str, Influences]]


def find_smallest_rank(comparison: Comparison, read: ReadExamples) -> RankFinding | None:
    """Judge the configurations of a comparison; None while none has a result.

    Args:
        comparison: The arms.
        read: Gives the influences of examples on the judged metric, by run id.
    """
    key = source_of(comparison.primary_metric)
    silent = {arm.spec_hash for arm in comparison.silent}
    judged = [
        each
        for each in comparison.configurations
        if each.metric(key)
        and isinstance(each.params.get(RANK), int | float)
        and not silent & {arm.spec_hash for arm in each.arms}
    ]
    greater = comparison.greater_is_better if key == comparison.primary_metric else greater_is_better(key)
    places: dict[str, int] = {}

    def influences(indices: Sequence[int]) -> Mapping[int, Influence | None]:
        arms = {i: [arm for arm in judged[i].finished if _value(arm, key) is not None] for i in indices}
        tables = read([arm for each in arms.values() for arm in each])
        return {i: _mean([tables.get(arm.run_id) for arm in each], places) for i, each in arms.items()}

    verdict = judge([_candidate(each, key, greater) for each in judged], influences, confidence=CONFIDENCE)
    if verdict is None:
        return None
    known = {rank_of(each) for each in judged}
    ranks = {rank_of(each) for each in comparison.configurations if isinstance(each.params.get(RANK), int | float)}
    return RankFinding(
        key=key,
        configurations=tuple(judged),
        verdict=verdict,
        greater_is_better=greater,
        unjudged=tuple(sorted(ranks - known)),
    )


def smallest_rank(store: Store, comparison: Comparison) -> RankFinding | None:
    """Judge a comparison with the results of single examples out of the store; if they cannot be read, without them."""
    key = source_of(comparison.primary_metric)
    problems: list[str] = []

    def read(arms: Sequence[ArmRecord]) -> Mapping[str, Influences]:
        try:
            return read_influences(store, arms, key)
        except TrackingError as error:  # An artifact store without access must not hide the results that are there.
            problems.append(str(error))
            return {}

    finding = find_smallest_rank(comparison, read)
    return replace(finding, problem=problems[0]) if finding is not None and problems else finding


def source_of(key: str) -> str:
    """The mean over examples that a key is a function of (perplexity: the loss); the key itself where it is a mean."""
    for name in known_names():
        try:
            if key in metric_facts(name).derived:
                return find_metrics([name])[0].derived[key].source
        except ConfigError:  # A metric of another package that cannot be loaded gives no key that was evaluated here.
            continue
    return key


def _candidate(configuration: Configuration, key: str, greater: bool) -> RankCandidate:
    values = [arm.metrics[key] for arm in configuration.finished if _value(arm, key) is not None]
    errors = [each.stderr for each in values]
    sign = 1.0 if greater else -1.0
    return RankCandidate(
        rank=rank_of(configuration),
        values=tuple(sign * each.value for each in values if each.value is not None),
        stderr=None if None in errors else math.sqrt(math.fsum((e or 0.0) ** 2 for e in errors) / len(errors)),
        examples=min(each.n for each in values),
    )


def _value(arm: ArmRecord, key: str) -> float | None:
    return arm.metrics[key].value if key in arm.metrics else None


def _mean(tables: Sequence[Influences | None], places: dict[str, int]) -> Influence | None:
    """Mean over the seeds, with each example at the place that it has in every array; None where a table is missing."""
    known = [table for table in tables if table is not None]
    if not tables or len(known) < len(tables):
        return None
    for table in known:
        for name in table.ids:
            places.setdefault(name, len(places))
    mean = np.zeros(len(places))
    for table in known:
        np.add.at(mean, [places[name] for name in table.ids], table.values / len(known))
    return mean
