"""The arms of an experiment compared: configurations ranked by the mean over seeds, the best arm, number formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rankwise.evaluation.metrics import MetricValue, SeedMean, over_seeds
from rankwise.experiment.answer_plan import AnswerPlan
from rankwise.experiment.halving import PRUNED
from rankwise.files import format_size

Param = int | float | str | bool

RANK = "lora.r"
ALPHA = "lora.alpha"
SEED = "seed"


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """One arm as the tracking store has it.

    Attributes:
        spec_hash: The arm.
        run_id: Its MLflow run; empty before a worker has claimed it.
        status: MLflow's: FINISHED, FAILED, KILLED, RUNNING, SCHEDULED.
        reason: Why it failed or was killed.
        params: Under MLflow's names, numbers as numbers.
        model_uri: `models:/NAME/VERSION`; None when it is not registered.
        adapter_parameters: Trainable parameters.
        adapter_bytes: Size of the adapter's weights file.
        metrics: Evaluation results; empty before the evaluation.
        seconds: Time of training.
        peak_memory_bytes: Of the training process, so that arms of one pack share it.
        artifacts: Run id to the URI of its artifacts: the arm's own run, and the one in another experiment that it is
            linked to (an empty URI: ask for it).
        effective_rank: Mean over the modules of Roy and Vetterli's effective rank of the delta.
        rank_99: The smallest rank that keeps 99 % of the energy of all deltas.
    """

    spec_hash: str
    run_id: str
    status: str
    reason: str | None = None
    params: Mapping[str, Param]
    model_uri: str | None = None
    adapter_parameters: int | None = None
    adapter_bytes: int | None = None
    metrics: Mapping[str, MetricValue]
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)
    effective_rank: float | None = None
    rank_99: int | None = None

    @property
    def pruned(self) -> bool:
        """Whether early stopping ended it, which is not a failure."""
        return self.status == "KILLED" and (self.reason or "").startswith(PRUNED)

    def to_json(self) -> dict[str, object]:
        """The arm as `compare --json` has it."""
        return {
            "spec_hash": self.spec_hash,
            "run_id": self.run_id or None,
            "status": self.status,
            "reason": self.reason,
            "params": dict(self.params),
            "model_uri": self.model_uri,
            "adapter": {"parameters": self.adapter_parameters, "bytes": self.adapter_bytes},
            "metrics": {key: metric.to_json() for key, metric in self.metrics.items()},
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            "pruned": self.pruned,
            "effective_rank": self.effective_rank,
            "rank_99": self.rank_99,
        }


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """Arms that differ in nothing but the seed."""

    arms: tuple[ArmRecord, ...]

    @cached_property
    def params(self) -> Mapping[str, Param]:
        """What the arms share, the seed left out."""
        return {key: value for key, value in self.arms[0].params.items() if key != SEED}

    @property
    def finished(self) -> tuple[ArmRecord, ...]:
        """The arms that count."""
        return tuple(arm for arm in self.arms if arm.status == "FINISHED")

    def metric(self, key: str) -> SeedMean | None:
        """Mean over the seeds that finished; None when none has a value."""
        return over_seeds([arm.metrics[key] for arm in self.finished if key in arm.metrics])


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All arms of an experiment, sorted by rank, then by the other settings, then by seed.

    `plan` is what its answer rests on, None without one; `earlier_plans` are those that it replaced (None where there
    was none).
    """

    experiment: str
    primary_metric: str
    greater_is_better: bool
    base: Mapping[str, MetricValue]
    arms: tuple[ArmRecord, ...]
    experiment_id: str | None = None
    parent_run_id: str | None = None
    plan: AnswerPlan | None = None
    earlier_plans: tuple[AnswerPlan | None, ...] = ()

    @cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """Arms grouped by all settings but the seed, in the order of the arms."""
        groups: dict[frozenset[tuple[str, Param]], list[ArmRecord]] = {}
        for arm in self.arms:
            settings = frozenset((key, value) for key, value in arm.params.items() if key != SEED)
            groups.setdefault(settings, []).append(arm)
        return tuple(Configuration(arms=tuple(arms)) for arms in groups.values())

    @cached_property
    def silent(self) -> tuple[ArmRecord, ...]:
        """Finished arms whose primary metric is about less than half as large a share of their examples as another's.

        A metric that leaves out predictions without a number would otherwise be won by saying nothing.
        """
        shares = [
            (arm, arm.metrics[self.primary_metric].n / max(1, *(each.n for each in arm.metrics.values())))
            for arm in self.arms
            if arm.status == "FINISHED" and _has_value(arm, self.primary_metric)
        ]
        most = max((share for _, share in shares), default=0.0)
        return tuple(arm for arm, share in shares if 2 * share < most)

    @cached_property
    def ranking(self) -> tuple[Configuration, ...]:
        """Configurations with a value of the primary metric, best mean first; equal ones by fewer parameters.

        Those with a silent arm have no place.
        """
        silent = {arm.spec_hash for arm in self.silent}

        def order(configuration: Configuration) -> tuple[float, int]:
            summary = configuration.metric(self.primary_metric)
            assert summary is not None
            parameters = configuration.arms[0].adapter_parameters
            return (-summary.value if self.greater_is_better else summary.value, parameters or 0)

        placed = [
            each
            for each in self.configurations
            if each.metric(self.primary_metric) and not silent & {arm.spec_hash for arm in each.arms}
        ]
        return tuple(sorted(placed, key=order))

    @cached_property
    def best(self) -> ArmRecord | None:
        """The best arm of the best configuration; None while no arm has finished with a value."""
        if not self.ranking:
            return None

        def order(arm: ArmRecord) -> float:
            value = arm.metrics[self.primary_metric].value
            assert value is not None
            return -value if self.greater_is_better else value

        return min((arm for arm in self.ranking[0].finished if _has_value(arm, self.primary_metric)), key=order)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Settings that differ between arms, without rank, alpha and seed."""
        keys = dict.fromkeys(key for arm in self.arms for key in arm.params)
        return tuple(
            key
            for key in keys
            if key not in {RANK, ALPHA, SEED} and len({arm.params.get(key) for arm in self.arms}) > 1
        )

    @cached_property
    def varying(self) -> tuple[str, ...]:
        """Settings that differ, without rank and seed; alpha is one where it does not follow from the rank."""
        alphas: dict[Param | None, set[Param | None]] = {}
        for configuration in self.configurations:
            alphas.setdefault(configuration.params.get(RANK), set()).add(configuration.params.get(ALPHA))
        free = any(len(values) > 1 for values in alphas.values())
        return (ALPHA, *self.axes) if free else self.axes

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys of all metrics, in the order of the base's, then of the arms'."""
        sources = [self.base, *(arm.metrics for arm in self.arms)]
        return tuple(dict.fromkeys(key for metrics in sources for key in metrics))

    def to_json(self) -> dict[str, object]:
        """The dictionary that `compare --json` prints."""
        return {
            "experiment": self.experiment,
            "primary_metric": {"name": self.primary_metric, "greater_is_better": self.greater_is_better},
            "base": {"metrics": {key: metric.to_json() for key, metric in self.base.items()}},
            "arms": [arm.to_json() for arm in self.arms],
            "best": self.best.spec_hash if self.best else None,
            "experiment_id": self.experiment_id,
            "parent_run_id": self.parent_run_id,
        }


def compare(
    experiment: str,
    arms: Sequence[ArmRecord],
    *,
    primary_metric: str,
    greater_is_better: bool,
    base: Mapping[str, MetricValue] | None = None,
    experiment_id: str | None = None,
    parent_run_id: str | None = None,
    plan: AnswerPlan | None = None,
    earlier_plans: Sequence[AnswerPlan | None] = (),
) -> Comparison:
    """Put arms side by side.

    Args:
        experiment: Its name.
        arms: One record per spec hash, in any order.
        primary_metric: The key that decides, such as `eval.loss`.
        greater_is_better: Its direction.
        base: The bare base's results on the same examples; None or empty while there are none.
        experiment_id: MLflow's.
        parent_run_id: The sweep's run.
        plan: What its answer rests on.
        earlier_plans: The plans that it replaced.
    """
    return Comparison(
        experiment=experiment,
        primary_metric=primary_metric,
        greater_is_better=greater_is_better,
        base=dict(base or {}),
        arms=tuple(sorted(arms, key=_order)),
        experiment_id=experiment_id,
        parent_run_id=parent_run_id,
        plan=plan,
        earlier_plans=tuple(earlier_plans),
    )


def _has_value(arm: ArmRecord, key: str) -> bool:
    return key in arm.metrics and arm.metrics[key].value is not None


def _order(arm: ArmRecord) -> tuple[object, ...]:
    first = [_sortable(arm.params.get(key)) for key in (RANK, ALPHA)]
    rest = [(key, _sortable(value)) for key, value in sorted(arm.params.items()) if key not in {RANK, ALPHA, SEED}]
    return (*first, tuple(rest), _sortable(arm.params.get(SEED)), arm.spec_hash)


def _sortable(value: Param | None) -> tuple[int, float, str]:
    """Numbers by size, then texts, then what is missing."""
    if isinstance(value, int | float):
        return (0, float(value), "")
    return (1, 0.0, value) if isinstance(value, str) else (2, 0.0, "")


TITLES = {
    "eval.loss": "loss",
    "eval.perplexity": "perplexity",
    "eval.token_accuracy": "token accuracy",
    "eval.exact_match": "exact match",
    "eval.mean_absolute_error": "mean absolute error",
    "eval.mean_relative_error": "mean relative error",
    "eval.within_20_percent": "within 20 %",
    "eval.parse_failures": "parse failures",
}
SHARES = frozenset(
    {
        "eval.token_accuracy",
        "eval.exact_match",
        "eval.mean_relative_error",
        "eval.within_20_percent",
        "eval.parse_failures",
    }
)
# Follow from other metrics, so tables leave them out; `--json` has them.
SECONDARY = frozenset({"eval.perplexity", "eval.mean_relative_error"})
NONE = "-"


def title(key: str) -> str:
    """The metric's name for people."""
    return TITLES.get(key, key.removeprefix("eval.").replace("_", " "))


def format_value(key: str, value: float | None, stderr: float | None = None) -> tuple[str, str]:
    """A value and its standard error as texts, both with the digits that the error supports (two of its own).

    Returns:
        Texts of value and error; the error is empty where there is none, the value a dash where it is not defined.
    """
    if value is None or not math.isfinite(value):
        return NONE, ""
    scale, unit = (100.0, " %") if key in SHARES else (1.0, "")
    shown, error = value * scale, None if stderr is None else stderr * scale
    digits = 3 if abs(shown) < 10 and key not in SHARES else 1
    if error:
        digits = min(max(1 - math.floor(math.log10(error)), 0), 4)
    return f"{shown:,.{digits}f}{unit}", "" if error is None else f"{error:,.{digits}f}"


def with_error(key: str, value: float | None, stderr: float | None = None) -> str:
    """`0.710 ±0.020`."""
    shown, error = format_value(key, value, stderr)
    return f"{shown} ±{error}" if error else shown


def format_count(count: int | None) -> str:
    """`460,800` as `461k`, in a thousand's steps."""
    if count is None:
        return NONE
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1e3:,.0f}k" if count < 10_000_000 else f"{count / 1e6:,.1f}M"


def format_bytes(count: int | None) -> str:
    """Decimal units, three significant digits: MB is 10^6 bytes."""
    return NONE if count is None else format_size(count, ".3g")


def format_seconds(seconds: float | None) -> str:
    """`75.2` as `1m15s`."""
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def format_param(value: object) -> str:
    """A setting as a person writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return NONE if value is None else str(value)
