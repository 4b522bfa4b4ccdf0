"""Made-up sweeps with results of single rows, for tests of the answer and of what shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from helpers.comparisons import BASE, arm
from rankwise.evaluation.compare import ArmRecord, Comparison, compare
from rankwise.evaluation.gather import Influences
from rankwise.evaluation.metrics import MetricValue
from rankwise.experiment.answer_plan import AnswerPlan


def answered(
    truth: Mapping[int, float],
    *,
    margin: float = 0.05,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    seed_sd: float = 0.003,
    row_sd: float = 0.02,
    rows: int = 90,
    clusters: Sequence[int] | None = None,
    plan: AnswerPlan | None = None,
    settings: Sequence[Mapping[str, object]] = ({},),
    without: Sequence[tuple[int, int]] = (),
    failed: Sequence[tuple[int, int]] = (),
    draw: int = 0,
    key: str = "eval.loss",
    greater: bool = False,
):
    """A comparison whose ranks have these true results, and a function that reads the influences of its rows.

    `settings` are the other settings that every rank is trained with; `without` and `failed` are ranks and seeds.
    """
    generator = np.random.default_rng(draw)
    own = range(rows) if clusters is None else clusters
    hard = generator.normal(0.0, 1.0, rows)
    tables: dict[str, Influences] = {}
    arms: list[ArmRecord] = []
    for rank, quality in truth.items():
        for setting in settings:
            taste = generator.normal(0.0, row_sd, rows)
            for seed in seeds:
                if (rank, seed) in without:
                    continue
                made = arm(rank, 0.0, seed=seed, **setting)
                results = quality + generator.normal(0.0, seed_sd) + hard + taste
                results = results + generator.normal(0.0, row_sd, rows)
                mean = float(results.mean())
                value = MetricValue(value=mean, stderr=0.1, n=rows)
                others = {name: replace(metric, n=rows) for name, metric in made.metrics.items()}
                made = replace(made, metrics={**others, key: value})
                if (rank, seed) in failed:
                    made = replace(made, status="FAILED", reason="the loss is not finite", metrics={})
                arms.append(made)
                names = {name: at for at, name in enumerate(dict.fromkeys(own))}
                at = [names[name] for name in own]
                tables[made.run_id] = Influences(
                    tuple(map(str, names)),
                    np.bincount(at, weights=(results - mean) / rows),
                    np.bincount(at, weights=np.full(rows, 1 / rows)),
                    rows,
                    False,
                )
    if plan is None:
        plan = AnswerPlan(margin=margin, looks=(tuple(seeds),), fixed=True)
    comparison: Comparison = compare(
        "x", arms, primary_metric=key, greater_is_better=greater, base=BASE, plan=plan, experiment_id="7"
    )
    return comparison, lambda asked: {each.run_id: tables[each.run_id] for each in asked}
