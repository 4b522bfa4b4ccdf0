"""Read what the report of a comparison shows, and make the page: a bounded number of requests, however many arms."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankwise.evaluation.compare import ArmRecord, Comparison
from rankwise.evaluation.rank_finding import RankFinding
from rankwise.evaluation.report_learning import chosen_arms
from rankwise.evaluation.report_page import Material, make_page
from rankwise.evaluation.report_sources import TRAIN_LOSS, read_curves, read_layers

if TYPE_CHECKING:
    from rankwise.tracking.store import Store

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `rankwise ui` serves."""
_MOST_LAYER_LINES = 12


def report_page(
    store: Store, comparison: Comparison, finding: RankFinding | None, *, command: str, version: str
) -> str:
    """The HTML page of a comparison.

    Args:
        store: Where its arms are.
        comparison: The arms.
        finding: What `smallest_rank` has found.
        command: How to make the page again.
        version: Of rankwise.

    Raises:
        TrackingError: The store cannot be reached.
    """
    curve_arms = chosen_arms(comparison, finding)
    keys = list(dict.fromkeys([TRAIN_LOSS, "eval.loss", comparison.primary_metric]))
    layer_arms = _of_ranks(comparison, finding)
    return make_page(
        Material(
            comparison=comparison,
            finding=finding,
            curve_arms=curve_arms,
            curves=read_curves(store, curve_arms, keys),
            curve_keys=keys,
            layer_arms=layer_arms,
            layers=read_layers(store, layer_arms),
            mlflow=LOCAL_UI,
            command=command,
            version=version,
        )
    )


def _of_ranks(comparison: Comparison, finding: RankFinding | None) -> list[ArmRecord]:
    """An arm of the best configuration of each rank; without results, of each rank that has finished."""
    if finding is not None:
        found = [each.finished[0] for each, _, _ in finding.by_rank]
    else:
        found = [each.finished[0] for each in comparison.configurations if each.finished]
    return found[:_MOST_LAYER_LINES]
