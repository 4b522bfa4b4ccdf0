"""Metric values as they travel through MLflow, and their mean over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankwise.evaluation.metrics import MetricValue

STDERR = ".stderr"
COUNT = ".n"
PREFIX = "eval."


def to_tracking(metrics: Mapping[str, MetricValue]) -> dict[str, float]:
    """Flat MLflow metrics: `KEY`, `KEY.stderr`, `KEY.n`. What is not defined is left out; `KEY.n` is always there."""
    flat: dict[str, float] = {}
    for key, metric in metrics.items():
        if metric.value is not None:
            flat[key] = metric.value
        if metric.stderr is not None:
            flat[key + STDERR] = metric.stderr
        flat[key + COUNT] = float(metric.n)
    return flat


def from_tracking(flat: Mapping[str, float]) -> dict[str, MetricValue]:
    """The metric values among a run's metrics: every `eval.` key that has a count (others are no means of examples).

    MLflow can hold NaN and infinity, of other writers too: such a value is not defined.
    """
    flat = finite(flat)
    values: dict[str, MetricValue] = {}
    for name, count in flat.items():
        if name.startswith(PREFIX) and name.endswith(COUNT):
            key = name.removesuffix(COUNT)
            values[key] = MetricValue(value=flat.get(key), stderr=flat.get(key + STDERR), n=int(count))
    return values


def finite(flat: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {name: value for name, value in flat.items() if math.isfinite(value)}


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """A metric of one configuration, over its seeds.

    Attributes:
        value: Mean over the seeds.
        spread: Standard deviation over the seeds; None with one seed.
        stderr: Standard error of `value` (see `over_seeds`); None where it is not known.
        seeds: How many seeds have a value.
    """

    value: float
    spread: float | None
    stderr: float | None
    seeds: int


def over_seeds(values: Sequence[MetricValue]) -> SeedMean | None:
    """Mean, spread and standard error of one metric over the seeds of a configuration; None when no seed has a value.

    All seeds are evaluated on the same examples, so the examples' own variance does not shrink with more seeds and that
    of the seeds does: stderr² = spread² / seeds + mean of the seeds' stderr². It errs on the large side, since the
    spread holds some of the examples' variance too.
    """
    known = [metric.value for metric in values if metric.value is not None]
    if not known:
        return None
    mean = math.fsum(known) / len(known)
    errors = [metric.stderr for metric in values if metric.value is not None and metric.stderr is not None]
    of_examples = math.fsum(error**2 for error in errors) / len(errors) if errors else None
    if len(known) == 1:
        return SeedMean(value=mean, spread=None, stderr=errors[0] if errors else None, seeds=1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    stderr = math.sqrt(variance / len(known) + (of_examples or 0.0))
    return SeedMean(value=mean, spread=math.sqrt(variance), stderr=stderr, seeds=len(known))
