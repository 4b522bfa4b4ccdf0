"""The answer of a sweep: which ranks are enough, by how much they can be worse, and what decides the others.

D(r) is the mean over seeds and rows of the primary metric at rank r minus that at the largest rank, positive where r is
worse, each at its own values of the tuned fields. With the confidence of the definition, all of these hold together:

- a rank that is *enough* is worse than the largest by no more than the margin;
- a rank that is *not enough* is worse by more than the margin.

Half of the error is for each kind of claim, each half divided equally between the looks at the results (`contrasts`
has the tests and the variance). What an earlier look decided stays.

No statement is made with one seed, with fewer than 20 effective clusters of rows, or before all seeds of a look have
ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.evaluation.contrasts import (
    ENOUGH,
    NOT_ENOUGH,
    UNDECIDED,
    Array,
    Codes,
    Contrasts,
    Tails,
    contrast,
    effective_clusters,
    limits,
    outcomes,
)

LEAST_CLUSTERS = 20
"""Effective clusters of rows (Kish) below which nothing is said about ranks."""
MAX_FAILED_SHARE = 0.1
"""A rank with a larger share of failed seeds is not called enough: the seeds that are left are its better ones."""
_MOST_SEEDS = 200

Status = Literal["enough", "not_enough", "undecided", "reference"]
_STATUS: Mapping[int, Status] = {ENOUGH: "enough", NOT_ENOUGH: "not_enough", UNDECIDED: "undecided"}


@dataclass(frozen=True, kw_only=True)
class RankTable:
    """Results of K ranks over S seeds and G clusters of rows; the last rank is the largest.

    Attributes:
        ranks: (K,) ascending.
        seeds: (S,) in the order of the plan.
        values: (K, S) means of the metric, smaller is better; NaN where there is none.
        influences: (K, S, G) as in `contrasts.contrast`.
        shares: (G,) of the clusters in the weights.
        failed: (K, S) seeds that were trained and gave no result.
        width: The largest possible difference of one row; None if unknown.
        candidates: Among how many values of the tuned fields each rank's were chosen.
    """

    ranks: tuple[float, ...]
    seeds: tuple[int, ...]
    values: Array
    influences: Array
    shares: Array
    failed: NDArray[np.bool_]
    width: float | None = None
    candidates: int = 1

    @property
    def clusters(self) -> float:
        """Effective number of clusters of rows."""
        return float(effective_clusters(self.shares))

    def of(self, count: int) -> RankTable:
        """The first seeds only."""
        return RankTable(
            ranks=self.ranks,
            seeds=self.seeds[:count],
            values=self.values[:, :count],
            influences=self.influences[:, :count],
            shares=self.shares,
            failed=self.failed[:, :count],
            width=self.width,
            candidates=self.candidates,
        )


@dataclass(frozen=True, kw_only=True)
class RankOutcome:
    """What is said about one rank.

    Attributes:
        rank: The rank.
        status: `reference` is the largest rank, with which the others are compared.
        difference: D(r); 0 for the reference, None without a result.
        lower: Lower confidence limit; None where it is unknown, or for the reference.
        upper: Upper confidence limit.
        seeds: Number of seeds that it and the reference have.
        failed: Number of its seeds that failed.
        by_seed: The difference to the reference, by seed.
        more_seeds: For an undecided rank, about how many seeds in all would decide; None if no number below 200 would.
        reason: Why it is undecided, if not by noise.
        blocked: Whether the reason is that a larger rank is not enough, so that it is not tested.
    """

    rank: float
    status: Status
    difference: float | None = None
    lower: float | None = None
    upper: float | None = None
    seeds: int = 0
    failed: int = 0
    by_seed: Mapping[int, float] = field(default_factory=dict)
    more_seeds: int | None = None
    reason: str | None = None
    blocked: bool = False

    def to_json(self) -> dict[str, object]:
        """The rank as `compare --json` has it."""
        return {
            "r": int(self.rank) if self.rank == int(self.rank) else self.rank,
            "status": self.status,
            "difference": self.difference,
            "lower": self.lower,
            "upper": self.upper,
            "seeds": self.seeds,
            "failed": self.failed,
            "more_seeds": self.more_seeds,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """The limits with the first `seeds` seeds, at the tails of the answer: a picture, not a test."""

    seeds: int
    lower: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The outcome of the looks so far.

    Attributes:
        outcomes: One for each rank, ascending; the last is the reference.
        look: The look that was the last one, from 1.
        looks: How many are planned.
        seed_sd: Standard deviation of a difference between two ranks over seeds: the largest of all ranks'.
        beyond_most: Ranks that `most` seeds will probably not decide.
        narrowing: Limits by number of seeds.
        pooled: Whether the variance between seeds is pooled over ranks.
    """

    outcomes: tuple[RankOutcome, ...]
    look: int
    looks: int
    seed_sd: float
    beyond_most: tuple[float, ...]
    narrowing: tuple[Narrowing, ...]
    pooled: bool

    @property
    def reference(self) -> RankOutcome:
        """The largest rank."""
        return self.outcomes[-1]

    @property
    def undecided(self) -> tuple[RankOutcome, ...]:
        """Ranks that more seeds may decide."""
        return tuple(each for each in self.outcomes if each.status == "undecided" and each.reason is None)

    @property
    def named(self) -> RankOutcome | None:
        """The smallest rank that is enough; the reference if no other rank can be; None while that is open."""
        smallest = next((each for each in self.outcomes if each.status == "enough"), None)
        if smallest is not None:
            return smallest
        undecided = any(each.status == "undecided" and not each.blocked for each in self.outcomes)
        return None if undecided else self.reference


def decide(
    table: RankTable,
    looks: Sequence[int],
    *,
    margin: float,
    confidence: float,
    planned: int,
) -> Decision:
    """Test all ranks against the largest one.

    Args:
        table: The results.
        looks: Numbers of seeds of the looks that have ended, ascending; at least one.
        margin: How much worse is still enough.
        confidence: Of all claims together.
        planned: Number of looks in the plan.
    """
    tails = Tails.of(confidence, len(table.ranks) - 1, planned)
    shape = (len(table.ranks) - 1,)
    codes: Codes = np.zeros(shape, dtype=np.int8)
    lower, upper, difference = (np.full(shape, np.nan) for _ in range(3))
    seeds = np.zeros(shape, dtype=np.int64)
    made = None
    for count in looks:
        part = table.of(count)
        made = contrast(part.values, part.influences, part.shares)
        low, high = limits(made, tails.upper, tails.lower, width=table.width, candidates=table.candidates)
        allowed, may_be_worse = _allowed(part)
        decided = codes != UNDECIDED
        codes = outcomes(low, high, margin, before=codes, may_be_enough=allowed, may_be_worse=may_be_worse)
        for kept, new in ((lower, low), (upper, high), (difference, made.difference), (seeds, made.seeds)):
            kept[~decided] = new[~decided]
    assert made is not None, "at least one look"
    last = table.of(looks[-1])
    reasons = _reasons(last, codes, seeds)
    more = [_seeds_to_decide(made, k, margin, tails, table) for k in range(shape[0])]
    found = [
        RankOutcome(
            rank=table.ranks[k],
            status=_STATUS[int(codes[k])],
            difference=_finite(difference[k]) if seeds[k] else None,
            lower=_finite(lower[k]),
            upper=_finite(upper[k]),
            seeds=int(seeds[k]),
            failed=int(last.failed[k].sum()),
            by_seed=_by_seed(last, k),
            more_seeds=more[k] if codes[k] == UNDECIDED and reasons[k] is None else None,
            reason=reasons[k],
            blocked=reasons[k] is not None and _larger_not_enough(codes, k) is not None,
        )
        for k in range(shape[0])
    ]
    known = int(np.isfinite(last.values[-1]).sum())
    reference = RankOutcome(
        rank=table.ranks[-1], status="reference", difference=0.0, seeds=known, failed=int(last.failed[-1].sum())
    )
    paired = made.seeds > 1
    deviations = np.sqrt(np.where(paired, made.seed_variance, 0.0) * made.seeds)
    return Decision(
        outcomes=(*found, reference),
        look=len(looks),
        looks=planned,
        seed_sd=float(np.max(deviations, initial=0.0)),
        beyond_most=tuple(
            each.rank for each in found
            if each.status == "undecided" and each.reason is None
            and (each.more_seeds is None or each.more_seeds > len(table.seeds))
        ),
        narrowing=_narrowing(last, tails),
        pooled=bool(made.pooled.any()),
    )  # fmt: skip


def failed_share(failed: int, seeds: int) -> float:
    """Share of a rank's ended seeds that failed."""
    return failed / seeds if seeds else 0.0


def _allowed(table: RankTable) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which ranks may be called enough, and which not enough, by shares of failed seeds and common seeds."""
    ended = np.isfinite(table.values) | table.failed
    shares = table.failed.sum(axis=1) / np.maximum(ended.sum(axis=1), 1)
    common = (np.isfinite(table.values[:-1]) & np.isfinite(table.values[-1:])).sum(axis=1)
    enough = (shares[:-1] <= MAX_FAILED_SHARE) & (common > 1)
    # A reference whose bad seeds failed looks better than it is.
    worse = np.full(len(table.ranks) - 1, bool(shares[-1] <= MAX_FAILED_SHARE))
    return enough, worse


def _reasons(table: RankTable, codes: Codes, seeds: NDArray[np.int64]) -> list[str | None]:
    """Why ranks are undecided for another reason than noise, which more seeds would not change."""
    ended = (np.isfinite(table.values) | table.failed).sum(axis=1)
    failed = table.failed.sum(axis=1)
    reasons: list[str | None] = []
    for k, code in enumerate(codes):
        larger = _larger_not_enough(codes, k)
        if code != UNDECIDED:
            reasons.append(None)
        elif failed_share(int(failed[k]), int(ended[k])) > MAX_FAILED_SHARE:
            reasons.append(
                f"{failed[k]} of {ended[k]} seeds failed; at most {100 * MAX_FAILED_SHARE:g} % may, since the others "
                "are its better ones"
            )
        elif seeds[k] < 2:
            reasons.append(f"it has {seeds[k]} seeds in common with r = {table.ranks[-1]:g}; two are needed")
        elif larger is not None:
            reasons.append(f"r = {table.ranks[larger]:g}, a larger rank, is not enough")
        else:
            reasons.append(None)
    return reasons


def _larger_not_enough(codes: Codes, k: int) -> int | None:
    return next((j for j in range(k + 1, len(codes)) if codes[j] == NOT_ENOUGH), None)


def _by_seed(table: RankTable, k: int) -> dict[int, float]:
    differences = table.values[k] - table.values[-1]
    return {
        seed: float(value) for seed, value in zip(table.seeds, differences, strict=True) if math.isfinite(float(value))
    }


def _seeds_to_decide(made: Contrasts, k: int, margin: float, tails: Tails, table: RankTable) -> int | None:
    """About how many seeds would decide a rank, if its difference and variances stay as they are."""
    if made.seeds[k] < 2:
        return None
    each = float(made.seed_variance[k] * made.seeds[k])
    ranks = len(table.ranks) - 1 if made.pooled[k] else 1
    for count in range(int(made.seeds[k]) + 1, _MOST_SEEDS + 1):
        assumed = Contrasts(
            difference=made.difference[k : k + 1],
            seeds=np.array([count]),
            seed_variance=np.array([each / count]),
            seed_freedom=np.array([float(ranks * (count - 1))]),
            pooled=made.pooled[k : k + 1],
            row_variance=made.row_variance[k : k + 1],
            row_freedom=made.row_freedom[k : k + 1],
            third_moment=made.third_moment[k : k + 1],
            clusters=made.clusters,
            all_tied=made.all_tied[k : k + 1],
        )
        low, high = limits(assumed, tails.upper, tails.lower, width=table.width, candidates=table.candidates)
        if high[0] <= margin or low[0] > margin:
            return count
    return None


def _narrowing(table: RankTable, tails: Tails) -> tuple[Narrowing, ...]:
    found = []
    for count in range(2, len(table.seeds) + 1):
        part = table.of(count)
        made = contrast(part.values, part.influences, part.shares)
        low, high = limits(made, tails.upper, tails.lower, width=table.width, candidates=table.candidates)
        found.append(Narrowing(seeds=count, lower=tuple(map(float, low)), upper=tuple(map(float, high))))
    return tuple(found)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
