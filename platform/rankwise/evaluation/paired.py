"""The difference of two models on the same examples, with a bootstrap confidence interval.

Both models met the same examples, so examples are resampled with their pair of results: what makes an example hard
cancels out, and the interval is that of the difference (Efron and Tibshirani 1993, *An Introduction to the Bootstrap*;
Koehn 2004 for its use on paired systems). Every metric is a ratio of sums (`metrics.Sample`), and so it is in each
resample. Examples that are no measurements of their own (equal prompts) are resampled together, as clusters.

Each end of the interval is the more careful one of two:

- the percentile interval, expanded for few examples (Hesterberg 2015, *The American Statistician* 69, 371: the tail is
  that of Student's t times sqrt(n / (n - 1)); unexpanded, ten examples err twice as often as said);
- the bootstrap-t interval (Efron and Tibshirani, chapter 12), whose error is small for skewed differences too: of 100
  lognormal ones the percentile interval errs three times as often as said. Alone it is too narrow for counts of few.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtrit

from rankwise.evaluation.metrics import Sample

RESAMPLES = 10_000
# Counts of a part of the resamples at once: 64 MiB of them.
_COUNTS_AT_ONCE = 8 << 20
# Fewer resamples in a tail do not say where it begins: it is found further in, and moved out as Student's t says.
_LEAST_IN_TAIL = 20


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
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of two weighted means over the same examples.

    Examples that count for one model only (a prediction without a number has no error to take) are left out of both:
    what such a silence costs is for a metric of its own, as `eval.parse_failures` is.

    Args:
        candidate: Each example's share of the candidate's mean.
        reference: The same examples, in the same order, of the reference.
        clusters: Examples with equal ones are resampled together; None: each is a measurement of its own.
        confidence: Of the two-sided interval, in (0, 1).
        resamples: Bootstrap resamples.
        seed: Of the resampling: equal arguments give equal intervals.

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
    low, high = _interval(table, value, 1 - confidence, resamples, seed)
    return Difference(value=value, low=low, high=high, n=n, clusters=m)


Table = NDArray[np.float64]


def _value(sums: Table) -> float:
    return float(sums[0] / sums[1] - sums[2] / sums[3])


def _interval(table: Table, value: float, alpha: float, resamples: int, seed: int) -> tuple[float, float]:
    m = len(table)
    # Centred first: only deviations from the means matter, and small ones keep their digits.
    wholes = table.sum(axis=0)
    table = table.copy()
    table[:, 0] -= wholes[0] / wholes[1] * table[:, 1]
    table[:, 2] -= wholes[2] / wholes[3] * table[:, 3]
    inner = max(alpha, 2 * _LEAST_IN_TAIL / resamples)
    outwards = stdtrit(m - 1, alpha / 2) / stdtrit(m - 1, inner / 2)
    generator = np.random.default_rng(seed)
    first, second = np.triu_indices(4)
    products = table[:, first] * table[:, second]
    found: list[tuple[Table, Table]] = []
    left = resamples
    while left:
        part = min(left, max(1, _COUNTS_AT_ONCE // m))
        drawn = generator.integers(m, size=(part, m)) + m * np.arange(part)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=part * m).reshape(part, m)
        sums = counts @ table
        found.append((sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3], _errors(sums, counts @ products)))
        left -= part
    moves, errors = (np.concatenate(parts) for parts in zip(*found, strict=True))
    own = float(_errors(table.sum(axis=0, keepdims=True), products.sum(axis=0, keepdims=True))[0])
    # A resample without any variance says nothing of how far its mean is off, in units of it.
    known = errors > 1e-9 * own
    studentized = moves[known] / errors[known]
    tail = ndtr(stdtrit(m - 1, inner / 2) * math.sqrt(m / (m - 1)))
    low, high = np.quantile(moves, [tail, 1 - tail])
    if len(studentized):
        below, above = np.quantile(studentized, [inner / 2, 1 - inner / 2])
        low, high = min(low, -above * own), max(high, -below * own)
    return value + float(outwards * low), value + float(outwards * high)


def _errors(sums: Table, products: Table) -> Table:
    """Standard errors (R,) of R differences, linearised (`metrics.weighted_mean`), without the factor of n.

    Args:
        sums: (R, 4), of the columns.
        products: (R, 10), sums of the products of two columns, in the order of `np.triu_indices(4)`.
    """
    one, other = sums[:, 0] / sums[:, 1], sums[:, 2] / sums[:, 3]
    # An example moves the difference by its four numbers times these.
    slopes = np.stack([1 / sums[:, 1], -one / sums[:, 1], -1 / sums[:, 3], other / sums[:, 3]], axis=1)
    first, second = np.triu_indices(4)
    twice = np.where(first == second, 1.0, 2.0)
    squares = np.sum(twice * slopes[:, first] * slopes[:, second] * products, axis=1)
    errors: Table = np.sqrt(np.maximum(squares, 0.0))
    return errors
