"""What a comparison says about the smallest rank that is enough, as numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from rankwise.evaluation.compare import RANK, Configuration
from rankwise.evaluation.labels import format_param, format_value, title
from rankwise.evaluation.smallest_rank import Verdict

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
            return f"r = {rank} is the only rank with a result: there is nothing to compare it with."
        if not math.isfinite(self.verdict.at_most):
            return (
                f"r = {best} has the best mean; how far the others are behind cannot be told: the noise is not known."
            )
        smallest = min(rank_of(each) for each in self.configurations)
        with_result = " with a result" if any(rank < smallest for rank in self.unjudged) else ""
        if self.chosen is self.best:
            if rank_of(self.chosen) == smallest:
                return f"r = {rank} is the smallest rank{with_result}, and no larger one has a better mean."
            largest = rank_of(self.chosen) == max(rank_of(each) for each in self.configurations)
            which = ", the largest that has a result," if largest else ""
            return f"r = {rank}{which} is the best, and every smaller rank is worse beyond noise ({percent})."
        told = (
            f"{title(self.key)} {self._mean(self.chosen)} against {self._mean(self.best)}, truly worse by "
            f"{self.amount(self.verdict.at_most)} at most ({percent})"
        )
        if rank_of(self.chosen) > smallest:
            named = f"r = {rank} is the smallest rank that is not worse than the best (r = {best}) beyond noise"
            return f"{named}: {told}."
        told_apart = any(not stands for _, _, stands in self.by_rank)
        end = "" if told_apart else " No rank is told apart from the best."
        same = "another configuration of it" if rank == best else f"r = {best}"
        return f"r = {rank}, the smallest{with_result}, is not worse than the best ({same}) beyond noise: {told}.{end}"

    @property
    def notes(self) -> list[str]:
        """What a reader has to know to trust the first line, one sentence or two each."""
        verdict, count = self.verdict, len(self.configurations)
        if count == 1:
            return []
        notes = [
            f"Rule: a configuration is out when its mean of {title(self.key)} is worse than the best one's by more "
            f"than the one-sided {100 * verdict.confidence:g} % limit of their difference, corrected for the number of "
            f"comparisons with the best, {verdict.comparisons:,} (Bonferroni; Gupta 1965, Hsu 1984). A truly best "
            f"configuration is put out in at most {100 * (1 - verdict.confidence):g} % of sweeps."
        ]
        if verdict.paired:
            notes.append(
                f"Noise over examples: every configuration met the same {self._examples:,} ones, and differences are "
                "taken example by example."
            )
        else:
            notes.append(
                "Noise over examples: results of single examples are not stored for all, so the errors of both count "
                "as independent, which is too large where what is hard for one adapter is hard for the other."
            )
        if self.problem:
            notes.append(f"Results of single examples could not be read: {self.problem}")
        if verdict.seeds:
            notes.append(
                "Noise over seeds: the variance between seeds of one configuration, pooled over all, or its own where "
                "that is larger."
            )
        else:
            notes.append(
                "Noise over seeds is not known: every configuration has one seed. The claim is about these adapters; "
                "trained again with another seed, they may come out in another order. Give sweep.parameters.seed two "
                "values or more."
            )
        if verdict.unread:
            notes.append(
                f"{verdict.unread:,} configurations are close to the best and were kept without looking at their "
                "examples; this can make the named rank smaller and the limit larger, never the other way."
            )
        if self.unjudged:
            ranks = ", ".join(format_param(rank) for rank in self.unjudged)
            notes.append(f"Not judged, since no arm has a result that counts: r = {ranks}.")
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
