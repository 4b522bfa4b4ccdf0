"""The arms behind an answer: which ones are compared, at which tuned values, and whether a comparison is possible.

Arms that differ in other swept settings are compared within these: a result of a rank and a seed is the mean over all
settings that every rank has. Alpha may follow from the rank. Settings that no two ranks share make a comparison
impossible, since a difference could come from them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankwise.evaluation.answer import MAX_FAILED_SHARE, RankTable, failed_share
from rankwise.evaluation.compare import ALPHA, RANK, SEED, ArmRecord, Comparison, Param
from rankwise.evaluation.gather import Influences
from rankwise.experiment.answer_plan import AnswerPlan
from rankwise.experiment.arm import param_name

Settings = tuple[tuple[str, Param | None], ...]
"""Names and values of settings."""
ReadInfluences = Callable[[Sequence[ArmRecord]], Mapping[str, Influences]]
"""Reads the influences of rows on the metric, by run id; arms without usable results are left out."""
ALPHA_OVER_RANK = "alpha / r"


class NoAnswer(Exception):
    """Raised when nothing can be said about ranks; the text says why, and continues "No statement about ranks: "."""


@dataclass(frozen=True, kw_only=True)
class Arms:
    """The arms of a comparison, sorted for an answer.

    Attributes:
        key: The metric.
        greater_is_better: Its direction.
        ranks: Ascending; those that early stopping ended are left out.
        pruned: Ranks that early stopping ended.
        stopped: At which rungs early stopping ended how many arms, such as `pruned at step 16`.
        chosen: By rank, the values of the tuned fields that pilot seeds chose.
        candidates: Among how many values.
        averaged: Other settings that results are averaged over, and their values.
        left_out: Other settings that not every rank has.
        cells: By rank and seed, the arms of one result.
        pilots: Arms of the pilot seeds at the chosen values.
        width: How many arms one result has: one for each combination of the settings in `averaged`.
    """

    key: str
    greater_is_better: bool
    ranks: tuple[float, ...]
    pruned: tuple[float, ...]
    stopped: Mapping[str, int]
    chosen: Mapping[float, Settings]
    candidates: int
    averaged: Mapping[str, tuple[Param | None, ...]]
    left_out: int
    cells: Mapping[tuple[float, int], tuple[ArmRecord, ...]]
    pilots: tuple[ArmRecord, ...] = ()
    width: int = 1

    def state(self, rank: float, seed: int) -> str:
        """`done`, `failed`, `pending` or `absent`, of the arms of a result."""
        arms = self.cells.get((rank, seed), ())
        states = {arm_state(arm, self.key) for arm in arms}
        if len(arms) < self.width:
            return "absent"
        return next(state for state in ("pending", "failed", "done") if state in states)

    def pending(self, ranks: Iterable[float], seeds: Sequence[int], *, fixed: bool) -> int:
        """How many results of these ranks and seeds are still to come."""
        states = [self.state(rank, seed) for rank in ranks for seed in seeds]
        return states.count("pending") + (0 if fixed else states.count("absent"))

    def results(self, seeds: Sequence[int]) -> list[ArmRecord]:
        """The arms of all results of these seeds."""
        wanted = [(rank, seed) for rank in self.ranks for seed in seeds if self.state(rank, seed) == "done"]
        return [arm for cell in wanted for arm in self.cells[cell]]

    def value(self, rank: float, seed: int) -> float:
        """A result, smaller is better; NaN where there is none."""
        if self.state(rank, seed) != "done":
            return math.nan
        values = [_value(arm, self.key) for arm in self.cells[rank, seed]]
        mean = math.fsum(value for value in values if value is not None) / len(values)
        return -mean if self.greater_is_better else mean


def arm_state(arm: ArmRecord, key: str) -> str:
    """`done`, `failed` (also a result that is not finite), or `pending` (also interrupted and cancelled ones)."""
    if arm.status == "FAILED":
        return "failed"
    if arm.status != "FINISHED" or key not in arm.metrics:
        return "pending"
    return "failed" if arm.metrics[key].value is None else "done"


def sort_arms(comparison: Comparison, plan: AnswerPlan) -> Arms:
    """Find the arms that are compared.

    Raises:
        NoAnswer: The largest rank was pruned, no comparison is possible, or pilot seeds are missing or pending.
    """
    key = comparison.primary_metric
    arms = [arm for arm in comparison.arms if isinstance(arm.params.get(RANK), int | float)]
    silent = {arm.spec_hash for arm in comparison.silent}
    tuned = tuple(param_name(path) for path in plan.tune)
    others = _other_settings(arms, tuned)
    all_ranks = sorted({_rank(arm) for arm in arms})
    pruned = tuple(rank for rank in all_ranks if all(arm.pruned for arm in arms if _rank(arm) == rank))
    if pruned and pruned[-1] == all_ranks[-1]:
        raise NoAnswer(f"early stopping ended r = {pruned[-1]:g}, the largest rank, with which others are compared")
    ranks = tuple(rank for rank in all_ranks if rank not in pruned)
    if len(ranks) < 2:
        raise NoAnswer(f"early stopping left only r = {ranks[0]:g}")
    strata: dict[Settings, set[float]] = {}
    for arm in arms:
        if not arm.pruned:
            strata.setdefault(others[arm.spec_hash], set()).add(_rank(arm))
    shared = [settings for settings, having in strata.items() if having == set(ranks)]
    if not shared:
        names = sorted({name for settings in strata for name, _ in settings})
        raise NoAnswer(
            f"no comparison is possible, because ranks also differ in {_join(names)}: give every rank the same "
            "values (a grid), or list fields in answer.tune"
        )
    by_cell: dict[tuple[float, Settings, int], list[ArmRecord]] = {}
    for arm in arms:
        if not arm.pruned and others[arm.spec_hash] in shared and isinstance(seed := arm.params.get(SEED, 0), int):
            values = tuple((name, arm.params.get(name)) for name in tuned)
            record = arm if arm.spec_hash not in silent else _without_value(arm)
            by_cell.setdefault((_rank(arm), values, seed), []).append(record)
    chosen, candidates = _tune(by_cell, ranks, plan, key, comparison.greater_is_better)
    names = [name for name, _ in shared[0]]
    return Arms(
        key=key,
        greater_is_better=comparison.greater_is_better,
        ranks=ranks,
        pruned=pruned,
        stopped=Counter((arm.reason or "").partition(":")[0] for arm in arms if arm.pruned),
        chosen=chosen,
        candidates=candidates,
        averaged={
            name: options
            for at, name in enumerate(names)
            if len(options := tuple(dict.fromkeys(settings[at][1] for settings in shared))) > 1
        },
        left_out=len(strata) - len(shared),
        cells={
            (rank, seed): tuple(cell)
            for (rank, values, seed), cell in by_cell.items()
            if values == chosen[rank] and seed not in plan.pilot
        },
        pilots=tuple(
            arm
            for (rank, values, seed), cell in by_cell.items()
            if values == chosen[rank] and seed in plan.pilot
            for arm in cell
        ),
        width=len(shared),
    )


def _other_settings(arms: Sequence[ArmRecord], tuned: Sequence[str]) -> dict[str, Settings]:
    """By spec hash, what varies besides rank, seed and tuned fields; alpha only where it does not follow the rank."""
    keys = dict.fromkeys(key for arm in arms for key in arm.params if key not in {RANK, SEED, *tuned})
    varying = [key for key in keys if len({arm.params.get(key) for arm in arms}) > 1]
    found = {arm.spec_hash: tuple((key, arm.params.get(key)) for key in varying if key != ALPHA) for arm in arms}
    if ALPHA not in varying:
        return found
    alphas: dict[tuple[Settings, float], set[Param | None]] = {}
    for arm in arms:
        alphas.setdefault((found[arm.spec_hash], _rank(arm)), set()).add(arm.params.get(ALPHA))
    if all(len(values) == 1 for values in alphas.values()):
        return found
    ratios = {arm.spec_hash: round(float(arm.params[ALPHA]) / _rank(arm), 6) for arm in arms}
    by_ratio = len(set(ratios.values())) < len({arm.params[ALPHA] for arm in arms})
    return {
        arm.spec_hash: (
            *found[arm.spec_hash],
            (ALPHA_OVER_RANK, ratios[arm.spec_hash]) if by_ratio else (ALPHA, arm.params[ALPHA]),
        )
        for arm in arms
    }


def _tune(
    cells: Mapping[tuple[float, Settings, int], Sequence[ArmRecord]],
    ranks: Sequence[float],
    plan: AnswerPlan,
    key: str,
    greater: bool,
) -> tuple[dict[float, Settings], int]:
    """Each rank's values of the tuned fields, chosen by the means over pilot seeds; and among how many."""
    values = {rank: list(dict.fromkeys(v for r, v, _ in cells if r == rank)) for rank in ranks}
    candidates = max(len(each) for each in values.values())
    if candidates == 1:
        return {rank: each[0] for rank, each in values.items()}, 1
    if not plan.pilot:
        raise NoAnswer(
            f"{_join(plan.tune)} is tuned, which needs pilot seeds besides the seeds of the answer; give at least "
            "three seeds"
        )
    chosen: dict[float, Settings] = {}
    for rank, options in values.items():
        if len(options) == 1:
            chosen[rank] = options[0]
            continue
        scores = []
        for option in options:
            arms = [arm for seed in plan.pilot for arm in cells.get((rank, option, seed), ())]
            states = [arm_state(arm, key) for arm in arms]
            if not arms or "pending" in states:
                raise NoAnswer(f"pilot seeds of {_join(plan.tune)} are still to be trained at r = {rank:g}")
            results = [value for arm in arms if (value := _value(arm, key)) is not None]
            mean = math.fsum(results) / len(results) if results else math.inf * (-1 if greater else 1)
            failing = failed_share(states.count("failed"), len(states)) > MAX_FAILED_SHARE
            scores.append((failing, -mean if greater else mean))
        chosen[rank] = options[scores.index(min(scores))]
    return chosen, candidates


def rank_table(arms: Arms, seeds: Sequence[int], read: ReadInfluences) -> tuple[RankTable, int]:
    """The numbers of an answer, and of how many rows they are.

    Raises:
        NoAnswer: Results of rows are missing, or arms were evaluated on different rows.
    """
    records = arms.results(seeds)
    tables = read(records)
    missing = [arm for arm in records if arm.run_id not in tables]
    if missing:
        raise NoAnswer(
            f"results of single rows cannot be read for {len(missing)} of {len(records)} arms, first of the run "
            f"{missing[0].run_id}"
        )
    places: dict[str, int] = {}
    for table in tables.values():
        for name in table.ids:
            places.setdefault(name, len(places))
    smallest = min(len(table.ids) for table in tables.values())
    if 2 * smallest < len(places):
        raise NoAnswer("arms were evaluated on different rows")
    influences = np.zeros((len(arms.ranks), len(seeds), len(places)))
    shares = np.zeros(len(places))
    sign = -1.0 if arms.greater_is_better else 1.0
    for k, rank in enumerate(arms.ranks):
        for s, seed in enumerate(seeds):
            if arms.state(rank, seed) == "done":
                cell = arms.cells[rank, seed]
                for arm in cell:
                    table = tables[arm.run_id]
                    at = [places[name] for name in table.ids]
                    influences[k, s, at] += sign * table.values / len(cell)
                    shares[at] += table.shares
    return RankTable(
        ranks=arms.ranks,
        seeds=tuple(seeds),
        values=np.array([[arms.value(rank, seed) for seed in seeds] for rank in arms.ranks]),
        influences=influences,
        shares=shares / len(records),
        failed=np.array([[arms.state(rank, seed) == "failed" for seed in seeds] for rank in arms.ranks]),
        width=1.0 if all(table.bounded for table in tables.values()) else None,
        candidates=arms.candidates,
    ), max(table.rows for table in tables.values())


def _without_value(arm: ArmRecord) -> ArmRecord:
    """A silent arm counts as failed: its metric is about too few of the rows."""
    return replace(arm, status="FAILED", reason="it has a value for too few rows")


def _rank(arm: ArmRecord) -> float:
    rank = arm.params[RANK]
    assert isinstance(rank, int | float)
    return float(rank)


def _value(arm: ArmRecord, key: str) -> float | None:
    return arm.metrics[key].value if key in arm.metrics else None


def _join(names: Sequence[str]) -> str:
    shown = [name.rpartition(".")[2].replace("_", " ") for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
