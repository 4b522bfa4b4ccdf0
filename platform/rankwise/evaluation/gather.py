"""Read the arms of an experiment out of the tracking store."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rankwise.evaluation.compare import ArmRecord, Comparison, Param, compare
from rankwise.evaluation.summary import finite, from_tracking
from rankwise.exceptions import ConfigError
from rankwise.experiment.metric_names import greater_is_better
from rankwise.redact import redact
from rankwise.tracking.query import RunRecord, by_spec_hash
from rankwise.tracking.sweeps import current_sweep, of_sweep

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
DEFAULT_PRIMARY_METRIC = "eval.loss"

# Params that are texts even where all their characters are digits (a commit, a column).
_TEXTS = re.compile(r"(base_model|init_from|dataset\.(train|train_revision|chat_template)$|lora\.target_modules)")
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
    )


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
