"""The difference of two models on the same examples, with a bootstrap confidence interval.

Both models met the same examples, so examples are resampled with their pair of results: what makes an example hard
cancels out, and the interval is that of the difference (Efron and Tibshirani 1993, *An Introduction to the Bootstrap*,
chapters 8 and 13: percentile interval; Koehn 2004 for its use on paired systems). Every metric is a ratio of sums
(`metrics.Sample`), and so it is in each resample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rankwise.evaluation.metrics import Sample

RESAMPLES = 10_000
# Counts of a part of the resamples at once: 64 MiB of them.
_COUNTS_AT_ONCE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of a candidate minus that of a reference.

    Attributes:
        value: The difference; None where one of both is not defined.
        low: Lower end of the confidence interval; None where `value` is.
        high: Upper end.
        n: Examples that count for both.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def paired_difference(
    candidate: Sequence[Sample],
    reference: Sequence[Sample],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of two weighted means over the same examples.

    Examples that count for one model only (a prediction without a number has no error to take) are left out of both:
    what such a silence costs is for a metric of its own, as `eval.parse_failures` is.

    Args:
        candidate: Each example's share of the candidate's mean.
        reference: The same examples, in the same order, of the reference.
        confidence: Of the two-sided interval, in (0, 1).
        resamples: Bootstrap resamples.
        seed: Of the resampling: equal arguments give equal intervals.

    Raises:
        ValueError: The numbers of examples differ.
    """
    if len(candidate) != len(reference):
        raise ValueError(f"paired examples are needed, got {len(candidate)} and {len(reference)}")
    pairs = [(a, b) for a, b in zip(candidate, reference, strict=True) if a.weight > 0 and b.weight > 0]
    n = len(pairs)
    if n == 0:
        return Difference(value=None, low=None, high=None, n=0)
    # Columns: total and weight of the candidate, total and weight of the reference.
    table = np.array([(a.total, a.weight, b.total, b.weight) for a, b in pairs], dtype=np.float64)
    sums = table.sum(axis=0)
    value = float(sums[0] / sums[1] - sums[2] / sums[3])
    if not np.isfinite(value):
        return Difference(value=None, low=None, high=None, n=n)
    generator = np.random.default_rng(seed)
    differences = []
    left = resamples
    while left:
        part = min(left, max(1, _COUNTS_AT_ONCE // n))
        counts = generator.multinomial(n, np.full(n, 1 / n), size=part)
        resampled = counts @ table
        differences.append(resampled[:, 0] / resampled[:, 1] - resampled[:, 2] / resampled[:, 3])
        left -= part
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(differences), [tail, 1 - tail])
    return Difference(value=value, low=float(low), high=float(high), n=n)
