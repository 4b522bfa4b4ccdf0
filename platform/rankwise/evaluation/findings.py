"""What a comparison shows: its configurations with results, and the answer about ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.evaluation.answer import LEAST_CLUSTERS, Decision, decide
from rankwise.evaluation.answer_arms import NoAnswer, ReadInfluences, rank_table, sort_arms
from rankwise.evaluation.answer_text import Answer, no_statement, statement, too_few_clusters
from rankwise.evaluation.compare import RANK, SEED, ArmRecord, Comparison, Configuration
from rankwise.evaluation.gather import Influences, read_influences
from rankwise.evaluation.metrics import find_metrics
from rankwise.exceptions import ConfigError, TrackingError
from rankwise.experiment.answer_plan import AnswerPlan
from rankwise.experiment.metric_names import greater_is_better, known_names, metric_facts

if TYPE_CHECKING:
    from rankwise.tracking.store import Store


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Configurations with a result, and the answer.

    Attributes:
        key: The metric that is shown: the primary one, or the mean that it is a function of.
        greater_is_better: Its direction.
        configurations: Those with a result, in the comparison's order; silent ones are left out.
        answer: What is said about ranks.
    """

    key: str
    greater_is_better: bool
    configurations: tuple[Configuration, ...]
    answer: Answer

    @property
    def best(self) -> Configuration | None:
        """The configuration with the best mean, a fact about these adapters; None without results."""
        sign = -1.0 if self.greater_is_better else 1.0
        return min(self.configurations, key=lambda each: sign * self._mean(each), default=None)

    @property
    def chosen(self) -> tuple[Configuration, ...]:
        """The configurations behind the rank that the answer names."""
        if self.answer.rank is None or self.answer.arms is None:
            return ()
        cells = self.answer.arms.cells
        named = {arm.spec_hash for (rank, _), cell in cells.items() if rank == self.answer.rank for arm in cell}
        return tuple(each for each in self.configurations if any(arm.spec_hash in named for arm in each.arms))

    @property
    def by_rank(self) -> list[Configuration]:
        """The configuration with the best mean of each rank, smallest first."""
        sign = -1.0 if self.greater_is_better else 1.0
        found: dict[float, Configuration] = {}
        for each in sorted(self.configurations, key=lambda each: (rank_of(each), sign * self._mean(each))):
            found.setdefault(rank_of(each), each)
        return list(found.values())

    def _mean(self, configuration: Configuration) -> float:
        mean = configuration.metric(self.key)
        assert mean is not None, "a configuration with a result"
        return mean.value


def rank_of(configuration: Configuration) -> float:
    """Its r."""
    rank = configuration.params[RANK]
    assert isinstance(rank, int | float)
    return float(rank)


def find(comparison: Comparison, read: ReadInfluences) -> Findings:
    """Find what a comparison shows; `read` gives the influences of rows on the primary metric, by run id."""
    key = source_of(comparison.primary_metric)
    silent = {arm.spec_hash for arm in comparison.silent}
    return Findings(
        key=key,
        greater_is_better=comparison.greater_is_better if key == comparison.primary_metric else greater_is_better(key),
        configurations=tuple(
            each
            for each in comparison.configurations
            if each.metric(key)
            and isinstance(each.params.get(RANK), int | float)
            and not silent & {arm.spec_hash for arm in each.arms}
        ),
        answer=find_answer(comparison, read),
    )


def findings(store: Store, comparison: Comparison) -> Findings:
    """Find what a comparison shows, with the results of single rows out of the store."""

    def read(arms: Sequence[ArmRecord]) -> Mapping[str, Influences]:
        try:
            return read_influences(store, arms, comparison.primary_metric)
        except TrackingError as error:
            raise NoAnswer(f"results of single rows cannot be read: {error}") from error

    return find(comparison, read)


def find_answer(comparison: Comparison, read: ReadInfluences) -> Answer:
    """Test the ranks of a comparison as its plan says."""
    plan = comparison.plan
    several = len({arm.params.get(RANK) for arm in comparison.arms}) > 1
    seeds = {arm.params.get(SEED) for arm in comparison.arms}
    if plan is None or not several or not comparison.ranking or len(seeds) < 2:
        return no_statement(comparison)
    try:
        return _test(comparison, plan, read)
    except NoAnswer as reason:
        return no_statement(comparison, str(reason))


def _test(comparison: Comparison, plan: AnswerPlan, read: ReadInfluences) -> Answer:
    arms = sort_arms(comparison, plan)
    reference = arms.ranks[-1]
    first = plan.looks[0]
    if missing := arms.pending(arms.ranks, first, fixed=plan.fixed):
        planned = len(arms.ranks) * len(first)
        raise NoAnswer(f"{missing} of {planned} results are still to come")
    if not any(arms.state(reference, seed) == "done" for seed in first):
        raise NoAnswer(f"r = {reference:g}, the largest rank, with which others are compared, has no result")
    table, rows = rank_table(arms, plan.seeds, read)
    if table.clusters < LEAST_CLUSTERS:
        raise NoAnswer(too_few_clusters(table.clusters, rows))
    looks = [len(look) for look in plan.looks]

    def look(number: int) -> Decision:
        return decide(table, looks[:number], margin=plan.margin, confidence=plan.confidence, planned=len(looks))

    decision = look(1)
    coming = 0
    if len(plan.looks) > 1 and decision.undecided:
        # Decided ranks count, too: the variance that is pooled over ranks is that of the seeds that all of them have.
        if arms.pending(arms.ranks, plan.seeds, fixed=plan.fixed):
            coming = arms.pending(arms.ranks, plan.seeds, fixed=True)
        else:
            decision = look(2)
    return statement(comparison, plan, arms, decision, rows, table.clusters, coming=coming)


def source_of(key: str) -> str:
    """The mean over examples that a key is a function of (perplexity: the loss); the key itself where it is a mean."""
    for name in known_names():
        try:
            if key in metric_facts(name).derived:
                return find_metrics([name])[0].derived[key].source
        except ConfigError:  # A metric of another package that cannot be loaded gives no key that was evaluated here.
            continue
    return key
