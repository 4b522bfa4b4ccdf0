"""What a report reads beyond the runs themselves: results of single examples, curves, anatomies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankwise.evaluation.compare import ArmRecord
from rankwise.evaluation.metrics import MetricValue
from rankwise.experiment.module_names import layer_of
from rankwise.tracking.artifacts import read_json
from rankwise.tracking.query import Point, metric_histories

if TYPE_CHECKING:
    from rankwise.tracking.store import Store

PREDICTIONS = "predictions.json"
ANATOMY = "anatomy.json"
TRAIN_LOSS = "train.loss"


class Influences(NamedTuple):
    """How much each example moves a mean: weight * (value - mean) / sum of weights.

    Attributes:
        ids: Of the examples; those with one prompt are one, under the id of the first.
        values: (n,), in their order; the sum is 0.
    """

    ids: tuple[str, ...]
    values: NDArray[np.float64]


def read_influences(store: Store, arms: Sequence[ArmRecord], key: str) -> dict[str, Influences]:
    """What each example does to an arm's mean, by run id; arms without a usable table are left out.

    The table of predictions has the examples' own values, not their weights. A mean is one over examples or over
    supervised tokens: the weights that give back the arm's logged mean are the right ones, and if neither does, the
    table is not of this evaluation and does not count.

    Args:
        store: The tracking store.
        arms: Evaluated arms.
        key: Of a mean over examples, such as `eval.loss`.

    Raises:
        TrackingError: The store cannot be reached.
    """
    tables = read_json(store.client, _places(arms), PREDICTIONS)
    found: dict[str, Influences] = {}
    for arm in arms:
        for run_id in arm.artifacts:
            if run_id in tables and (own := influences(tables[run_id], key, arm.metrics[key])) is not None:
                found[arm.run_id] = own
                break
    return found


def influences(table: Mapping[str, Any], key: str, mean: MetricValue) -> Influences | None:
    """The influences of the examples of one table of predictions; None where it does not give back the mean."""
    columns = table.get("columns", [])
    if mean.value is None or key not in columns or "id" not in columns:
        return None
    at, name = columns.index(key), columns.index("group" if "group" in columns else "id")
    rows = [row for row in table["data"] if row[at] is not None]
    if not rows or len(rows) != mean.n:
        return None
    values = np.array([row[at] for row in rows], dtype=np.float64)
    weightings = [np.ones(len(rows))]
    if "supervised_tokens" in columns:
        tokens = columns.index("supervised_tokens")
        weightings.append(np.array([row[tokens] or 0 for row in rows], dtype=np.float64))
    for weights in weightings:
        whole = weights.sum()
        own = float(weights @ values / whole) if whole else math.nan
        if math.isclose(own, mean.value, rel_tol=1e-6, abs_tol=1e-9):
            moves: dict[str, float] = {}
            for row, move in zip(rows, weights * (values - own) / whole, strict=True):
                moves[str(row[name])] = moves.get(str(row[name]), 0.0) + float(move)
            return Influences(tuple(moves), np.array(list(moves.values())))
    return None


def read_curves(store: Store, arms: Sequence[ArmRecord], keys: Sequence[str]) -> dict[str, dict[str, list[Point]]]:
    """Curves by run id and key, finite values only; one request for each of both, so the arms should be few.

    Raises:
        TrackingError: The store cannot be reached.
    """
    histories = metric_histories(store.client, [arm.run_id for arm in arms], list(keys))
    return {
        run_id: {key: [point for point in points if math.isfinite(point.value)] for key, points in curves.items()}
        for run_id, curves in histories.items()
    }


def read_layers(store: Store, arms: Sequence[ArmRecord]) -> dict[str, dict[int, float]]:
    """The mean effective rank of the deltas of each layer, by run id; arms without an anatomy are left out.

    Raises:
        TrackingError: The store cannot be reached.
    """
    tables = read_json(store.client, _places(arms), ANATOMY)
    found: dict[str, dict[int, float]] = {}
    for arm in arms:
        table = next((tables[run_id] for run_id in arm.artifacts if run_id in tables), None)
        layers = {} if table is None else _by_layer(table["adapter"]["targets"])
        if layers:
            found[arm.run_id] = layers
    return found


def _by_layer(targets: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    ranks: dict[int, list[float]] = {}
    for target in targets:
        layer, rank = layer_of(target["module"]), target["effective_rank"]
        if layer is not None and rank is not None and math.isfinite(rank):
            ranks.setdefault(layer, []).append(float(rank))
    return {layer: math.fsum(values) / len(values) for layer, values in sorted(ranks.items())}


def _places(arms: Sequence[ArmRecord]) -> dict[str, str]:
    return {run_id: uri for arm in arms for run_id, uri in arm.artifacts.items()}
