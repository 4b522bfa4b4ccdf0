"""How a report names configurations, arms and their ends."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.evaluation.compare import ALPHA, RANK, ArmRecord, Comparison, Configuration
from rankwise.evaluation.labels import format_param


def settings_text(comparison: Comparison, configuration: Configuration) -> str:
    """`r = 8, alpha 16, learning rate 0.002`: the rank and what else varies in the experiment."""
    parts = [f"r = {format_param(configuration.params.get(RANK))}"]
    parts += [f"{axis_name(key)} {format_param(configuration.params.get(key))}" for key in comparison.varying]
    return ", ".join(parts)


def axis_name(key: str) -> str:
    """`training.learning_rate` as `learning rate`."""
    return key.rpartition(".")[2].replace("_", " ")


def alpha_over_rank(configuration: Configuration) -> float | None:
    """Its alpha / r; None where one of both is not there."""
    alpha, rank = configuration.params.get(ALPHA), configuration.params.get(RANK)
    return round(alpha / rank, 6) if isinstance(alpha, int | float) and isinstance(rank, int | float) and rank else None


def status_of(arm: ArmRecord) -> str:
    """What became of an arm, for people."""
    if arm.pruned:
        return "pruned"
    if arm.status == "FINISHED" and not arm.metrics:
        return "not evaluated"
    return arm.status.lower()


def count_text(arms: Sequence[ArmRecord]) -> str:
    """`24 arms: 20 finished, 3 pruned, 1 failed`."""
    counts: dict[str, int] = {}
    for arm in arms:
        counts[status_of(arm)] = counts.get(status_of(arm), 0) + 1
    told = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{len(arms):,} {'arm' if len(arms) == 1 else 'arms'}: {told}"
