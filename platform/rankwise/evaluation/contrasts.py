"""Differences between ranks, their noise over seeds and evaluation rows, and one-sided confidence limits.

All functions take leading axes for many sweeps at once, which the simulations of `make proofs` use.

A contrast is the mean over seeds and rows of one rank minus that of the reference. Seeds and rows are crossed random
effects, so its variance is that of a two-way layout (Searle, Casella and McCulloch 1992, *Variance Components*, ch. 5):
V = V_seeds + max(0, V_rows - V_cells). V_seeds and V_rows both contain the noise of single cells (one row of one seed)
once, so it is subtracted once.

- V_seeds: differences are paired by seed. The residual variance of the table of ranks by seeds is pooled over ranks if
  Cochran's test of equal variances (Cochran 1941, *Annals of Eugenics* 11, 47) at 40 % does not reject. Otherwise each
  contrast has its own variance, with few degrees of freedom.
- V_rows: the jackknife over clusters of rows, residuals divided by (1 - share of the weights). Degrees of freedom are
  Kish's effective number of clusters minus 1, or fewer where a few clusters carry the variance: Satterthwaite's formula
  with the estimated fourth moment, 2 / (sum J^4 / (sum J^2)^2 - 1/n).
- Critical value: those of both parts weighted by their variances (Cochran 1964, *Biometrics* 20, 191).
- Skewness moves a limit outwards, never inwards, by the Cornish-Fisher term of a studentized mean, g (1 + 2 t^2) / 6
  (Johnson 1978, *JASA* 73, 536). Four standard errors of a skewness, 4 sqrt(6 / n), are added to the estimate of the
  rows: few rows cannot show their tail.
- Rows without any difference have no variance. Then the limit is that of events that were not seen, -log(tail) / n
  times the largest possible difference of one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Array = NDArray[np.float64]
Codes = NDArray[np.int8]

POOLING_LEVEL = 0.4
"""Level of the test of equal variances; pooling needs it not to reject, so a large one is careful."""
SKEWNESS_ERRORS = 4.0
"""Standard errors of a skewness that are added to the estimate, in the answer."""
_DRAWS = 20_000
_ROUNDING = 1e-11


@dataclass(frozen=True, kw_only=True)
class Contrasts:
    """K - 1 ranks against the reference; arrays (..., K - 1), positive differences are worse.

    Attributes:
        difference: Of the means over seeds and rows.
        seeds: Number of seeds that both have.
        seed_variance: Variance of `difference` from seeds, and its degrees of freedom.
        seed_freedom: See `seed_variance`.
        pooled: Whether `seed_variance` is pooled over ranks.
        row_variance: Variance from rows that seeds do not explain, and its degrees of freedom.
        row_freedom: See `row_variance`.
        third_moment: Of the rows' part.
        clusters: (...,) effective number of clusters of rows (Kish).
        all_tied: Whether no row differs.
    """

    difference: Array
    seeds: NDArray[np.int64]
    seed_variance: Array
    seed_freedom: Array
    pooled: NDArray[np.bool_]
    row_variance: Array
    row_freedom: Array
    third_moment: Array
    clusters: Array
    all_tied: NDArray[np.bool_]

    @property
    def variance(self) -> Array:
        """Of the differences, over seeds and rows."""
        return self.seed_variance + self.row_variance


def effective_clusters(shares: Array) -> Array:
    """Kish's effective number of clusters (...,) of shares (..., G) that sum to 1."""
    counts: Array = 1.0 / np.sum(np.square(shares), axis=-1)
    return counts


def contrast(values: Array, influences: Array, shares: Array) -> Contrasts:
    """Contrasts of ranks against the last one.

    Args:
        values: (..., K, S) results of ranks and seeds, smaller is better; NaN where a seed has no result.
        influences: (..., K, S, G) how much each cluster of rows moves a result: its part of the sum of
            weight * (value - mean) / sum of weights. They sum to 0 over the clusters.
        shares: (..., G) shares of the clusters in the weights.

    A contrast with fewer than two common seeds has an infinite variance.
    """
    known: NDArray[np.bool_] = np.isfinite(values)
    complete: NDArray[np.bool_] = np.all(known, axis=-2)
    common = known[..., :-1, :] & known[..., -1:, :]
    seeds = common.sum(axis=-1)
    enough = seeds > 1
    count, free = np.maximum(seeds, 1), np.maximum(seeds - 1, 1)
    filled = np.where(known, values, 0.0)
    paired = np.where(common, filled[..., :-1, :] - filled[..., -1:, :], 0.0)
    difference = paired.sum(axis=-1) / count
    squares = np.where(common, np.square(paired - difference[..., None]), 0.0).sum(axis=-1)
    own = squares / free / count
    pooled_variance, pooled_freedom, pool = _pooled(filled, complete)
    pooled = np.broadcast_to(pool[..., None], own.shape)
    seed_variance = np.where(pooled, 2 * pooled_variance[..., None] / count, own)
    clusters = effective_clusters(shares)
    rows = [
        _rows(influences[..., k, :, :], influences[..., -1, :, :], common[..., k, :], shares, clusters)
        for k in range(values.shape[-2] - 1)
    ]
    row_variance, row_freedom, third_moment, tied = (np.stack(part, axis=-1) for part in zip(*rows, strict=True))
    return Contrasts(
        difference=difference,
        seeds=seeds,
        seed_variance=np.where(enough, seed_variance, np.inf),
        seed_freedom=np.where(pooled, pooled_freedom[..., None], free).astype(np.float64),
        pooled=pooled,
        row_variance=row_variance,
        row_freedom=row_freedom,
        third_moment=third_moment,
        clusters=clusters,
        all_tied=tied.astype(np.bool_),
    )


def _pooled(values: Array, complete: NDArray[np.bool_]) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Residual variance (...,) of the table of ranks by complete seeds, its freedom, and whether to pool."""
    ranks = values.shape[-2]
    seeds = complete.sum(axis=-1)
    mask = complete[..., None, :]
    table = np.where(mask, values, 0.0)
    by_rank = table.sum(axis=-1, keepdims=True) / np.maximum(seeds, 1)[..., None, None]
    by_seed = table.mean(axis=-2, keepdims=True)
    residuals = np.where(mask, table - by_rank - by_seed + by_rank.mean(axis=-2, keepdims=True), 0.0)
    squares = np.square(residuals).sum(axis=-1)
    total = squares.sum(axis=-1)
    freedom = (ranks - 1) * np.maximum(seeds - 1, 1)
    largest = np.divide(squares.max(axis=-1), total, out=np.ones_like(total), where=total > 0)
    limits = np.zeros(values.shape[-1] + 1)
    for count in np.unique(seeds):
        limits[count] = _largest_share(ranks, int(count))
    # Of two ranks, both have the same residuals: the paired variance is all there is.
    pool = (largest <= limits[seeds]) & (seeds > 1) & (ranks > 2)
    return total / freedom, freedom.astype(np.float64), pool


@cache
def _largest_share(ranks: int, seeds: int) -> float:
    """The critical value of Cochran's test for residuals of a table, by simulation of normal ones."""
    if seeds < 2 or ranks < 3:
        return 0.0
    draws = np.random.default_rng(0).normal(size=(_DRAWS, ranks, seeds))
    draws -= draws.mean(axis=-1, keepdims=True)
    draws -= draws.mean(axis=-2, keepdims=True)
    squares = np.square(draws).sum(axis=-1)
    return float(np.quantile(squares.max(axis=-1) / squares.sum(axis=-1), 1 - POOLING_LEVEL))


def _rows(own: Array, reference: Array, common: NDArray[np.bool_], shares: Array, clusters: Array) -> tuple[Array, ...]:
    """Variance from rows (...,), its freedom, its third moment, and whether no row differs."""
    moves = own - reference
    seeds = np.maximum(common.sum(axis=-1), 1)
    kept = np.where(common[..., None], moves, 0.0)
    mean = kept.sum(axis=-2) / seeds[..., None]
    cells = np.where(common[..., None], np.square(kept - mean[..., None, :]), 0.0).sum(axis=(-1, -2))
    cells /= np.maximum(seeds - 1, 1) * seeds
    jackknifed = mean / (1.0 - shares)
    squares = np.square(jackknifed)
    total = squares.sum(axis=-1)
    # Rounding leaves differences of 1e-16 between equal rows.
    size = np.where(common[..., None], np.square(own) + np.square(reference), 0.0).sum(axis=(-1, -2)) / seeds
    tied = total <= _ROUNDING**2 * (size + 1.0 / clusters)
    fourth = np.divide(np.square(squares).sum(axis=-1), np.square(total), out=np.zeros_like(total), where=~tied)
    freedom = np.clip(2.0 / np.maximum(fourth - 1.0 / clusters, 1e-12), 1.0, clusters - 1.0)
    return np.maximum(total - cells, 0.0), freedom, (squares * jackknifed).sum(axis=-1), tied


def of_rows(influences: Array, shares: Array) -> Contrasts:
    """The contrast of two fixed models on the same rows: noise over rows only.

    Args:
        influences: (G,) how much each cluster moves the difference; their sum is 0.
        shares: (G,) of the clusters in the weights.
    """
    clusters = effective_clusters(shares)
    one = influences[None, :]
    variance, freedom, third, tied = _rows(one, np.zeros_like(one), np.ones(1, dtype=np.bool_), shares, clusters)
    return Contrasts(
        difference=np.zeros(1),
        seeds=np.ones(1, dtype=np.int64),
        seed_variance=np.zeros(1),
        seed_freedom=np.ones(1),
        pooled=np.zeros(1, dtype=np.bool_),
        row_variance=np.atleast_1d(variance),
        row_freedom=np.atleast_1d(freedom),
        third_moment=np.atleast_1d(third),
        clusters=clusters,
        all_tied=np.atleast_1d(tied).astype(np.bool_),
    )


def limits(
    contrasts: Contrasts,
    upper_tail: float,
    lower_tail: float,
    *,
    width: float | None = None,
    candidates: int = 1,
    skewness_errors: float = SKEWNESS_ERRORS,
) -> tuple[Array, Array]:
    """One-sided lower and upper confidence limits of the differences.

    Args:
        contrasts: The differences.
        upper_tail: How often the upper limit may be too low.
        lower_tail: How often the lower limit may be too high.
        width: The largest possible difference of one row; None if unknown, so that rows without any difference give
            infinite limits.
        candidates: Among how many settings each rank's were chosen by pilot seeds on the same rows. Seeds are fresh,
            rows are not: their part has the critical value of tail / candidates (Bonferroni).
        skewness_errors: How many standard errors are added to the estimated skewness.
    """
    lower = contrasts.difference - _reach(contrasts, lower_tail, -1.0, width, candidates, skewness_errors)
    upper = contrasts.difference + _reach(contrasts, upper_tail, 1.0, width, candidates, skewness_errors)
    return lower, upper


def _reach(
    contrasts: Contrasts, tail: float, sign: float, width: float | None, candidates: int, skewness_errors: float
) -> Array:
    rows = contrasts.row_variance
    seeds = np.where(np.isfinite(contrasts.seed_variance), contrasts.seed_variance, 0.0)
    variance = seeds + rows
    safe = np.where(variance > 0, variance, 1.0)
    of_rows = stdtrit(contrasts.row_freedom, 1 - tail / candidates)
    critical = (seeds * stdtrit(contrasts.seed_freedom, 1 - tail) + rows * of_rows) / safe
    unseen = skewness_errors * math.sqrt(6.0) / contrasts.clusters[..., None] * rows**1.5
    skewness = np.maximum(sign * contrasts.third_moment + unseen, 0.0) / safe**1.5
    reach = np.sqrt(variance) * (critical + skewness * (1 + 2 * critical**2) / 6)
    rare = math.inf if width is None else width * -math.log(tail / candidates)
    reach = reach + np.where(contrasts.all_tied, rare / contrasts.clusters[..., None], 0.0)
    return np.where(np.isfinite(contrasts.seed_variance), reach, np.inf)


ENOUGH, UNDECIDED, NOT_ENOUGH = 1, 0, -1


def outcomes(
    lower: Array,
    upper: Array,
    margin: float,
    *,
    before: Codes | None = None,
    may_be_enough: NDArray[np.bool_] | None = None,
    may_be_worse: NDArray[np.bool_] | None = None,
) -> Codes:
    """What the limits decide, as codes (..., K - 1) of ranks in ascending order.

    *Enough* is tested from the largest rank down and stops at the first that fails (Hsu and Berger 1999, *JASA* 94,
    468), so no correction for the number of ranks is needed. A rank that may not be enough for another reason
    is left out of the sequence.

    Args:
        lower: Lower limits, each corrected for the number of ranks.
        upper: Upper limits.
        margin: How much worse is still enough.
        before: Codes of an earlier look, which are kept where they are decided.
        may_be_enough: Where False, no rank is called enough (too many failed seeds).
        may_be_worse: Where False, no rank is called not enough.
    """
    earlier = np.zeros(lower.shape, dtype=np.int8) if before is None else before
    allowed = np.ones(lower.shape, dtype=np.bool_) if may_be_enough is None else may_be_enough
    passed = (upper <= margin) | (earlier == ENOUGH) | ~allowed
    sequence = np.logical_and.accumulate(passed[..., ::-1], axis=-1)[..., ::-1]
    worse = lower > margin
    if may_be_worse is not None:
        worse = worse & may_be_worse
    codes = np.where(sequence & allowed, ENOUGH, np.where(worse, NOT_ENOUGH, UNDECIDED))
    kept: Codes = np.where(earlier != UNDECIDED, earlier, codes).astype(np.int8)
    return kept


@dataclass(frozen=True, kw_only=True)
class Tails:
    """How the error is divided: half for each kind of claim, each half equally over the looks.

    Attributes:
        upper: Tail of the limits that say *enough*; the sequence needs no correction.
        lower: Tail of the limits that say *not enough*, by Bonferroni over the ranks.
    """

    upper: float
    lower: float

    @classmethod
    def of(cls, confidence: float, ranks: int, looks: int) -> Tails:
        """Of a test of `ranks` ranks against the reference in `looks` looks."""
        each = (1 - confidence) / 2 / looks
        return cls(upper=each, lower=each / max(1, ranks))
