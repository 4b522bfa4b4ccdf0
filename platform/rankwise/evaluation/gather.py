"""Read from the tracking store: the arms of an experiment, per-example results, curves and anatomies."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rankwise.evaluation.compare import ArmRecord, Comparison, Param, compare
from rankwise.evaluation.metrics import MetricValue, finite, from_tracking
from rankwise.exceptions import ConfigError
from rankwise.experiment.answer_plan import AnswerPlan
from rankwise.experiment.metric_names import greater_is_better
from rankwise.experiment.module_names import layer_of
from rankwise.redact import redact
from rankwise.tracking.query import (
    MetricPoint,
    RunRecord,
    by_spec_hash,
    current_sweep,
    metric_histories,
    of_sweep,
    read_json,
)

if TYPE_CHECKING:
    from rankwise.tracking.store import Store

# Written by the tasks that own the runs.
MODEL_URI = "rankwise.model_uri"
PRIMARY_METRIC = "rankwise.primary_metric"
LINKED = "rankwise.linked_run"
EVAL_HASH = "rankwise.eval_hash"
"""On the run of an arm or of the bare base: which evaluation its results are of."""
BASE_EVALUATIONS = "rankwise.base_evaluations"
"""On a sweep's run: the evaluations of the bare base that belong to it, separated by commas."""
ANSWER_PLAN = "rankwise.answer"
"""On a sweep's run: the plan of its answer as JSON (`AnswerPlan`); empty without one."""
EARLIER_PLANS = "rankwise.answer_before"
"""On a sweep's run: a JSON list of the plans that later submissions replaced; null where there was none."""
MORE_SEEDS = "rankwise.more_seeds"
"""On the run of a sweep that trains seeds on demand: `true`, or `false` if it stops after the first look."""
DEFAULT_PRIMARY_METRIC = "eval.loss"

# Params that are texts even where all their characters are digits (a commit, a column).
_TEXTS = re.compile(
    r"(base_model|init_from|dataset\.(train|train_revision|chat_template)$|"
    r"dataset\.train\.\d+\.(?!weight$|rows$)|lora\.target_modules)"
)
_INTEGER = re.compile(r"[+-]?[0-9]+")


def gather(store: Store, experiment: str, *, everything: bool = False, parent_run_id: str | None = None) -> Comparison:
    """The arms of an experiment's current sweep, by its name; two requests per thousand runs.

    The current sweep is the one that was submitted last: arms of earlier states of the definition are left out. Of
    several runs of one arm the last finished one counts, else the last one.

    Args:
        store: The MLflow store.
        experiment: Its name.
        everything: Take the arms of all sweeps.
        parent_run_id: Take this sweep for the current one.

    Raises:
        ConfigError: There is no such experiment, or it has no arms.
        TrackingError: The store cannot be reached.
    """
    experiment_id = store.find_experiment(experiment)
    if experiment_id is None:
        raise ConfigError(
            f"there is no MLflow experiment {experiment!r} in {redact(store.settings.tracking_uri)}; "
            "its name is the `name:` of the definition, and `rankwise run FILE` creates it"
        )
    runs = store.runs(experiment_id)
    trained = _of_kind(runs, "train")
    sweeps = _of_kind(runs, "sweep")
    sweep = current_sweep([run for run in sweeps if parent_run_id in (None, run.run_id)])
    if sweep is not None and not everything:
        trained = of_sweep(sweep, trained)
    arms = [arm_record(_decisive(of_arm)) for of_arm in by_spec_hash(trained).values()]
    if not arms:
        raise ConfigError(f"experiment {experiment!r} has no arms yet; start them with `rankwise run FILE`")
    plan, earlier = _plans({} if sweep is None else sweep.tags)
    bases = _bases(sweep, [run for run in _of_kind(runs, "base") if run.status == "FINISHED"])
    primary = DEFAULT_PRIMARY_METRIC if sweep is None else sweep.tags.get(PRIMARY_METRIC, DEFAULT_PRIMARY_METRIC)
    return compare(
        experiment,
        arms,
        primary_metric=primary,
        greater_is_better=greater_is_better(primary),
        base=from_tracking(bases[-1].metrics) if bases else None,
        experiment_id=experiment_id,
        parent_run_id=None if sweep is None else sweep.run_id,
        plan=plan,
        earlier_plans=earlier,
    )


def _plans(tags: Mapping[str, str]) -> tuple[AnswerPlan | None, tuple[AnswerPlan | None, ...]]:
    """The plan of a sweep's answer, and those that it replaced."""
    plan = json.loads(tags.get(ANSWER_PLAN) or "null")
    earlier = json.loads(tags.get(EARLIER_PLANS) or "[]")
    plan, *others = [None if each is None else AnswerPlan.from_json(each) for each in (plan, *earlier)]
    return plan, tuple(others)


def _bases(sweep: RunRecord | None, bases: Sequence[RunRecord]) -> Sequence[RunRecord]:
    """The runs of the bare base on the rows of a sweep; all of them where it does not say which these are."""
    named = "" if sweep is None else sweep.tags.get(BASE_EVALUATIONS, "")
    return [run for run in bases if run.tags.get(EVAL_HASH) in named.split(",")] if named else bases


def arm_record(run: RunRecord) -> ArmRecord:
    """An arm out of its run."""
    assert run.spec_hash is not None
    metrics = finite(run.metrics)
    return ArmRecord(
        spec_hash=run.spec_hash,
        run_id=run.run_id,
        status=run.status,
        reason=run.reason,
        params=typed_params(run.params),
        model_uri=run.tags.get(MODEL_URI),
        adapter_parameters=_whole(metrics.get("adapter.parameters")),
        adapter_bytes=_whole(metrics.get("adapter.bytes")),
        metrics=from_tracking(metrics),
        seconds=metrics.get("train.seconds"),
        peak_memory_bytes=_whole(metrics.get("train.peak_memory_bytes")),
        artifacts={run.run_id: run.artifact_uri} | ({linked: "" for linked in [run.tags.get(LINKED)] if linked}),
        effective_rank=metrics.get("adapter.effective_rank"),
        rank_99=_whole(metrics.get("adapter.rank_99")),
    )


def typed_params(params: Mapping[str, str]) -> dict[str, Param]:
    """MLflow keeps params as texts; give numbers and truth values back what they were."""
    return {key: value if _TEXTS.match(key) else _typed(value) for key, value in params.items()}


def _typed(text: str) -> Param:
    if text in {"True", "False"}:
        return text == "True"
    if _INTEGER.fullmatch(text):
        return int(text)
    try:
        number = float(text)
    except ValueError:
        return text
    return number if math.isfinite(number) else text  # a text "nan" is no number, and NaN is no JSON


def _of_kind(runs: Sequence[RunRecord], kind: str) -> list[RunRecord]:
    return [run for run in runs if run.kind == kind]


def _decisive(runs: Sequence[RunRecord]) -> RunRecord:
    finished = [run for run in runs if run.status == "FINISHED"]
    return (finished or runs)[-1]


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


PREDICTIONS = "predictions.json"
ANATOMY = "anatomy.json"
TRAIN_LOSS = "train.loss"


class Influences(NamedTuple):
    """How much each example moves a mean: weight * (value - mean) / sum of weights.

    Attributes:
        ids: Of the examples; those with one prompt are one, under the id of the first.
        values: (n,), in their order; the sum is 0.
        shares: (n,) of the weights; the sum is 1.
        rows: How many rows these examples are.
        bounded: Whether all values of rows are between 0 and 1, as those of a share are.
    """

    ids: tuple[str, ...]
    values: NDArray[np.float64]
    shares: NDArray[np.float64]
    rows: int
    bounded: bool


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
            places: dict[str, int] = {}
            at_cluster = np.array([places.setdefault(str(row[name]), len(places)) for row in rows])
            return Influences(
                tuple(places),
                np.bincount(at_cluster, weights=weights * (values - own) / whole).astype(np.float64),
                np.bincount(at_cluster, weights=weights / whole).astype(np.float64),
                len(rows),
                bool(values.min() >= 0.0 and values.max() <= 1.0),
            )
    return None


def read_curves(
    store: Store, arms: Sequence[ArmRecord], keys: Sequence[str]
) -> dict[str, dict[str, list[MetricPoint]]]:
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
