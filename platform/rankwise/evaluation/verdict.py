"""Find the smallest rank that is not worse than the best in a comparison: its results as candidates, and the rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from rankwise.evaluation.compare import RANK, ArmRecord, Comparison, Configuration
from rankwise.evaluation.metrics import find_metrics
from rankwise.evaluation.rank_finding import RankFinding, rank_of
from rankwise.evaluation.report_sources import Influences, read_influences
from rankwise.evaluation.smallest_rank import CONFIDENCE, Candidate, Influence, judge
from rankwise.exceptions import ConfigError, TrackingError
from rankwise.experiment.metric_names import facts, greater_is_better, known_names

if TYPE_CHECKING:
    from rankwise.tracking.store import Store

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
            if key in facts(name).derived:
                return find_metrics([name])[0].derived[key].source
        except ConfigError:  # A metric of another package that cannot be loaded gives no key that was evaluated here.
            continue
    return key


def _candidate(configuration: Configuration, key: str, greater: bool) -> Candidate:
    values = [arm.metrics[key] for arm in configuration.finished if _value(arm, key) is not None]
    errors = [each.stderr for each in values]
    sign = 1.0 if greater else -1.0
    return Candidate(
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
