"""The difference of two models on the same examples, with a confidence interval.

Both models met the same examples, so what makes an example hard cancels out. Every metric is a ratio of sums
(`metrics.Sample`); its difference is linearised with examples as units. Examples that are no measurements of their own
(equal prompts) are one unit. The interval is that of `contrasts`: a jackknife over the units, Student's t with degrees
of freedom by their effective number and by their kurtosis, and either end moved out for skewness.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankwise.evaluation.contrasts import limits, of_rows
from rankwise.evaluation.metrics import Sample

# The answer adds errors to the skewness, for 20 rows; promotion requires 100 examples, where they hardly matter.
_SKEWNESS_ERRORS = 0.0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One metric of a candidate minus that of a reference.

    Attributes:
        value: The difference; None where one of both is not defined.
        low: Lower end of the confidence interval; None where `value` is, and where one cluster has all examples.
        high: Upper end.
        n: Examples that count for both.
        clusters: What is resampled: `n`, or fewer where some examples are no measurements of their own.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    clusters: int

    @property
    def text(self) -> str:
        """Value, interval and number of examples."""
        n = f"n = {self.n}" if self.clusters == self.n else f"n = {self.n} in {self.clusters} clusters"
        if self.value is None:
            return f"not defined ({n})"
        interval = "no interval" if self.low is None else f"[{self.low:+.4g}, {self.high:+.4g}]"
        return f"{self.value:+.4g} {interval} ({n})"


def paired_difference(
    candidate: Sequence[Sample],
    reference: Sequence[Sample],
    *,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> Difference:
    """The difference of two weighted means over the same examples.

    Examples that count for one model only (a prediction without a number has no error to take) are left out of both:
    what such a silence costs is for a metric of its own, as `eval.parse_failures` is.

    Args:
        candidate: Each example's share of the candidate's mean.
        reference: The same examples, in the same order, of the reference.
        clusters: Examples with equal ones are one measurement; None: each is a measurement of its own.
        confidence: Of the two-sided interval, in (0, 1).

    Raises:
        ValueError: The numbers of examples differ.
    """
    names: Sequence[Hashable] = range(len(candidate)) if clusters is None else clusters
    if not len(candidate) == len(reference) == len(names):
        raise ValueError(f"paired examples are needed, got {len(candidate)} and {len(reference)}")
    # Columns: total and weight of the candidate, total and weight of the reference.
    rows = [
        (name, (a.total, a.weight, b.total, b.weight))
        for name, a, b in zip(names, candidate, reference, strict=True)
        if a.weight > 0 and b.weight > 0
    ]
    places = {name: place for place, name in enumerate(dict.fromkeys(name for name, _ in rows))}
    n, m = len(rows), len(places)
    table = np.zeros((m, 4))
    np.add.at(table, [places[name] for name, _ in rows], np.array([row for _, row in rows]).reshape(-1, 4))
    value = _value(table.sum(axis=0)) if n else math.nan
    if not math.isfinite(value):
        return Difference(value=None, low=None, high=None, n=n, clusters=m)
    if m == 1:
        return Difference(value=value, low=None, high=None, n=n, clusters=m)
    low, high = _interval(table, (1 - confidence) / 2)
    return Difference(value=value, low=value + low, high=value + high, n=n, clusters=m)


Table = NDArray[np.float64]


def _value(sums: Table) -> float:
    return float(sums[0] / sums[1] - sums[2] / sums[3])


def _interval(table: Table, tail: float) -> tuple[float, float]:
    """Both ends of the interval, as seen from the difference."""
    totals, weights = table[:, [0, 2]], table[:, [1, 3]]
    wholes = weights.sum(axis=0)
    moves = (totals - totals.sum(axis=0) / wholes * weights) / wholes
    shares = (weights / wholes).mean(axis=1)
    # Models that differ on no example have no interval: what they would do on others is not asked.
    made = of_rows(moves[:, 0] - moves[:, 1], shares)
    low, high = limits(made, tail, tail, width=0.0, skewness_errors=_SKEWNESS_ERRORS)
    return float(low[0]), float(high[0])
