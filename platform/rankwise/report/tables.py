"""Tables of the HTML report: all arms with links, arms without a result by reason, the answer rank by rank.

Also the texts by which reports name configurations, settings and arms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from rankwise.evaluation.answer import RankOutcome
from rankwise.evaluation.compare import (
    ALPHA,
    NONE,
    RANK,
    SECONDARY,
    SEED,
    ArmRecord,
    Comparison,
    Configuration,
    format_bytes,
    format_count,
    format_param,
    format_seconds,
    title,
    with_error,
)
from rankwise.evaluation.findings import Findings


def settings_text(comparison: Comparison, configuration: Configuration) -> str:
    """`r = 8, alpha 16, learning rate 0.002`: the rank and the other settings that vary in the experiment."""
    parts = [f"r = {format_param(configuration.params.get(RANK))}"]
    parts += [f"{axis_name(key)} {format_param(configuration.params.get(key))}" for key in comparison.varying]
    return ", ".join(parts)


def axis_name(key: str) -> str:
    """`training.learning_rate` as `learning rate`."""
    return key.rpartition(".")[2].replace("_", " ")


def alpha_over_rank(configuration: Configuration) -> float | None:
    """Return alpha / r, or None if either is missing."""
    alpha, rank = configuration.params.get(ALPHA), configuration.params.get(RANK)
    return round(alpha / rank, 6) if isinstance(alpha, int | float) and isinstance(rank, int | float) and rank else None


def status_of(arm: ArmRecord) -> str:
    """Return an arm's status as shown to users."""
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
    parts = ", ".join(f"{count:,} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{len(arms):,} {'arm' if len(arms) == 1 else 'arms'}: {parts}"


_MOST_METRICS = 6
_MOST_NAMED = 12
_MEASURED = re.compile(r"\d+\.\d+")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell.

    Attributes:
        text: The text.
        kind: CSS classes: `text` is left aligned, `mono`, `wide`, `clip` is one line that may be cut off.
        value: The sort key if it is not the text; empty sorts last.
        route: The link target in MLflow's UI.
        tag: The CSS class of the label around the text.
        drawn: Markup before the text.
    """

    text: str
    kind: str = ""
    value: float | str | None = None
    route: str = ""
    tag: str = ""
    drawn: Markup | None = None


class Column(NamedTuple):
    """A heading; `kind` as in `Cell`."""

    text: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One row; `kind` is its CSS class."""

    cells: Sequence[Cell]
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class ArmTable:
    """All arms, best configuration first, those without a result last."""

    heads: Sequence[Column]
    rows: Sequence[ReportRow]


def arm_table(comparison: Comparison, finding: Findings) -> ArmTable:
    """Return the table of all arms."""
    places = {arm.spec_hash: place for place, each in enumerate(comparison.ranking, start=1) for arm in each.arms}
    keys = [key for key in comparison.keys if key not in SECONDARY or key == comparison.primary_metric]
    keys = sorted(keys, key=lambda key: key != comparison.primary_metric)[:_MOST_METRICS]
    settings = [RANK, ALPHA, *comparison.axes]
    if len({arm.params.get(SEED) for arm in comparison.arms}) > 1:
        settings.append(SEED)
    heads = [
        Column("place"),
        *(Column("r" if key == RANK else axis_name(key)) for key in settings),
        *(Column(name, "text") for name in ("status", "run", "model")),
        *(Column(title(key)) for key in keys),
        *map(Column, ("parameters", "size", "time", "peak memory")),
        Column("reason", "text"),
    ]
    chosen = {arm.spec_hash for configuration in finding.chosen for arm in configuration.arms}
    best = comparison.best
    ordered = sorted(comparison.arms, key=lambda arm: places.get(arm.spec_hash, len(places) + 1))
    rows = []
    for arm in ordered:
        place = places.get(arm.spec_hash)
        status = status_of(arm)
        cells = [
            Cell(text=str(place or NONE), value=place or ""),
            *(_setting(arm.params.get(key)) for key in settings),
            Cell(text=status, kind="text", tag=status.replace(" ", "-")),
            Cell(text=arm.run_id[:8] or NONE, kind="text mono", route=run_route(comparison, arm)),
            Cell(
                text=(arm.model_uri or NONE).removeprefix("models:/"), kind="text", route=model_route(comparison, arm)
            ),
            *(_metric(arm, key) for key in keys),
            Cell(text=format_count(arm.adapter_parameters), value=_known(arm.adapter_parameters)),
            Cell(text=format_bytes(arm.adapter_bytes), value=_known(arm.adapter_bytes)),
            Cell(text=format_seconds(arm.seconds), value=_known(arm.seconds)),
            Cell(text=format_bytes(arm.peak_memory_bytes), value=_known(arm.peak_memory_bytes)),
            Cell(text=arm.reason or "", kind="text clip"),
        ]
        kind = "chosen" if arm.spec_hash in chosen else ""
        rows.append(ReportRow(cells=cells, kind=f"best {kind}".strip() if arm is best else kind))
    return ArmTable(heads=heads, rows=rows)


def endings(comparison: Comparison) -> tuple[list[Column], list[ReportRow]]:
    """Group arms without a result by status and reason; reasons that differ only in measured numbers count as one."""
    groups: dict[tuple[str, str], list[ArmRecord]] = {}
    for arm in comparison.arms:
        if (status := status_of(arm)) != "finished":
            groups.setdefault((status, _MEASURED.sub("#", arm.reason or "")), []).append(arm)
    rows = []
    for (status, _), arms in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
        by_rank: dict[str, list[str]] = {}
        for arm in arms[:_MOST_NAMED]:
            by_rank.setdefault(format_param(arm.params.get(RANK)), []).append(arm.spec_hash[:8])
        named = "; ".join(f"r = {rank}: {', '.join(hashes)}" for rank, hashes in by_rank.items())
        more = f" and {len(arms) - _MOST_NAMED:,} more" if len(arms) > _MOST_NAMED else ""
        reason = (arms[0].reason or "no reason was recorded") + (" (and similar)" if _differ(arms) else "")
        rows.append(
            ReportRow(
                cells=[
                    Cell(text=status, kind="text", tag=status.replace(" ", "-")),
                    Cell(text=f"{len(arms):,}"),
                    Cell(text=reason, kind="text wide"),
                    Cell(text=named + more, kind="text wide"),
                ]
            )
        )
    return [Column("", "text"), Column("arms"), Column("reason", "text"), Column("which", "text")], rows


_ANSWERS = {"enough": "enough", "not_enough": "not enough", "undecided": "undecided", "reference": "the largest"}


def rank_table(comparison: Comparison, finding: Findings) -> tuple[list[Column], list[ReportRow]]:
    """Return each rank with its mean and, where there is an answer, its difference, limits and outcome."""
    key, decision = finding.key, finding.answer.decision
    outcomes = {} if decision is None else {each.rank: each for each in decision.outcomes}
    heads = [Column("r")]
    if decision is not None:
        heads += [Column("answer", "text"), Column(f"worse than r = {decision.reference.rank:g} by")]
        heads += [Column("lower limit"), Column("upper limit"), Column("seeds"), Column("failed seeds")]
    heads += [Column(f"mean {title(key)}"), *([] if decision is not None else [Column("seeds")]), Column("size")]
    several = len(finding.by_rank) < len(finding.configurations)
    if comparison.varying and several:
        heads.append(Column("configuration with this mean", "text"))
    rows = []
    for configuration in finding.by_rank:
        mean, rank = configuration.metric(key), configuration.params.get(RANK)
        assert mean is not None, "a configuration with a result"
        cells = [Cell(text=format_param(rank))]
        if decision is not None:
            cells += _outcome_cells(outcomes.get(float(str(rank))))
        sizes = [arm.adapter_bytes for arm in configuration.finished if arm.adapter_bytes is not None]
        cells += [
            Cell(text=with_error(key, mean.value, mean.stderr)),
            *([] if decision is not None else [Cell(text=str(mean.seeds))]),
            Cell(text=format_bytes(max(sizes, default=None))),
        ]
        if comparison.varying and several:
            cells.append(Cell(text=settings_text(comparison, configuration).partition(", ")[2], kind="text wide"))
        named = finding.answer.rank is not None and finding.answer.rank == rank
        rows.append(ReportRow(cells=cells, kind="chosen" if named else ""))
    return heads, rows


def _outcome_cells(outcome: RankOutcome | None) -> list[Cell]:
    if outcome is None:
        return [Cell(text="not tested", kind="text", tag="undecided"), *(Cell(text=NONE) for _ in range(5))]
    reference = outcome.status == "reference"
    return [
        Cell(text=_ANSWERS[outcome.status], kind="text", tag=outcome.status.replace("_", "-")),
        Cell(text=NONE if reference else _signed(outcome.difference)),
        Cell(text=_signed(outcome.lower)),
        Cell(text=_signed(outcome.upper)),
        Cell(text=str(outcome.seeds)),
        Cell(text=str(outcome.failed) if outcome.failed else NONE),
    ]


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.3g}"


def run_route(comparison: Comparison, arm: ArmRecord) -> str:
    """Return the path of a run in MLflow's UI, after `#/`; empty if the experiment's id is unknown."""
    if comparison.experiment_id is None or not arm.run_id:
        return ""
    return f"experiments/{comparison.experiment_id}/runs/{arm.run_id}"


def model_route(comparison: Comparison, arm: ArmRecord) -> str:
    """Return the path of an arm's model version or logged model in MLflow's UI; empty without one."""
    name, _, version = (arm.model_uri or "").removeprefix("models:/").partition("/")
    if version:
        return f"models/{quote(name, safe='')}/versions/{quote(version, safe='')}"
    if name and comparison.experiment_id is not None:
        return f"experiments/{comparison.experiment_id}/models/{quote(name, safe='')}"
    return ""


def _setting(value: object) -> Cell:
    number = isinstance(value, int | float)
    return Cell(text=format_param(value), value=float(value) if isinstance(value, int | float) and number else None)


def _metric(arm: ArmRecord, key: str) -> Cell:
    metric = arm.metrics.get(key)
    if metric is None:
        return Cell(text=NONE, value="")
    return Cell(text=with_error(key, metric.value, metric.stderr), value=_known(metric.value))


def _known(value: float | None) -> float | str:
    return "" if value is None else value


def _differ(arms: Sequence[ArmRecord]) -> bool:
    return len({arm.reason for arm in arms}) > 1
