"""The comparison as a terminal table with notes, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from rankwise.evaluation.answer import Decision
from rankwise.evaluation.answer_text import Answer
from rankwise.evaluation.compare import (
    ALPHA,
    NONE,
    RANK,
    SECONDARY,
    ArmRecord,
    Comparison,
    Configuration,
    format_bytes,
    format_count,
    format_param,
    format_seconds,
    format_value,
    title,
    with_error,
)
from rankwise.evaluation.findings import Findings
from rankwise.report.costs import costs, importance

MOST_ROWS = 40
MOST_NAMED = 12
MOST_PRUNED = 3


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A heading and its cells; `leading` columns name the row and are repeated when the table is split."""

    heading: str
    cells: tuple[Text, ...]
    leading: bool = False


def comparison_view(comparison: Comparison, console: Console, finding: Findings) -> RenderableType:
    """Return the terminal table, split in two if the console is too narrow, with notes on what it leaves out.

    Args:
        comparison: The arms.
        console: The console to draw for.
        finding: Its configurations and answer.
    """
    shown = _shown(comparison, finding)
    columns = _columns(comparison, shown)
    whole = _table(columns, len(shown))
    parts: list[RenderableType] = [whole]
    if Measurement.get(console, console.options.update(width=10_000), whole).maximum > console.width:
        leading = [column for column in columns if column.leading]
        rest = [column for column in columns if not column.leading]
        results = [column for column in rest if column.heading not in _COST]
        costs = [column for column in rest if column.heading in _COST]
        parts = [_table([*leading, *each], len(shown)) for each in (results, costs)]
    answer = finding.answer
    first = [Text(answer.text, style=_ANSWER_STYLE[answer.status])]
    if answer.hint:
        first.append(Text(answer.hint, style="yellow"))
    if answer.decision is not None:
        first.append(Text(_limits(answer, answer.decision)))
    return Group(*first, Text(_headline(comparison)), *parts, *_notes(comparison, len(shown)))


_ANSWER_STYLE = {"enough": "bold green", "undecided": "bold yellow", "no_statement": "bold"}
_STATUS = {"enough": "enough", "not_enough": "not enough", "undecided": "undecided"}


def _limits(answer: Answer, decision: Decision) -> str:
    """One line: the difference and limits of each rank."""
    ranks = []
    for each in decision.outcomes:
        if each.status == "reference":
            continue
        limits = "" if each.lower is None or each.upper is None else f" [{each.lower:+.3g}, {each.upper:+.3g}]"
        difference = "no difference" if each.difference is None else f"{each.difference:+.3g}"
        ranks.append(f"r = {each.rank:g} {difference}{limits} {_STATUS[each.status]}")
    against = f"against r = {decision.reference.rank:g}, + is worse"
    return f"{title(answer.key)} {against}: {'; '.join(ranks)}"


def _shown(comparison: Comparison, finding: Findings) -> list[Configuration]:
    """All configurations; of many, the best ones and the best of each rank, in their order."""
    if len(comparison.configurations) <= MOST_ROWS:
        return list(comparison.configurations)
    wanted = {id(each) for each in finding.by_rank}
    for each in (*comparison.ranking, *comparison.configurations):
        if len(wanted) >= MOST_ROWS:
            break
        wanted.add(id(each))
    return [each for each in comparison.configurations if id(each) in wanted]


_COST = ("parameters", "size", "time", "peak memory")


def _columns(comparison: Comparison, configurations: Sequence[Configuration]) -> list[_Column]:
    places = {id(configuration): place for place, configuration in enumerate(comparison.ranking, start=1)}
    best = comparison.best

    def column(heading: str, values: Sequence[str], base: str = "", *, leading: bool = False) -> _Column:
        cells = [
            Text(value, style=_style(configuration, best))
            for value, configuration in zip(values, configurations, strict=True)
        ]
        return _Column(heading=heading, cells=(*cells, Text(base)), leading=leading)

    def of_first(key: str) -> list[str]:
        return [format_param(each.params.get(key)) for each in configurations]

    columns = [
        column("#", [_place(each, places.get(id(each)), best) for each in configurations], leading=True),
        column("r", of_first(RANK), "base", leading=True),
        column("alpha", of_first(ALPHA), leading=True),
        *(column(axis.rpartition(".")[2], of_first(axis), leading=True) for axis in comparison.axes),
    ]
    if any(len(each.arms) > 1 for each in configurations):
        columns.append(column("seeds", [_seeds(each) for each in configurations]))
    columns += [
        column("parameters", [format_count(_largest(each, "adapter_parameters")) for each in configurations], NONE),
        column("size", [format_bytes(_largest(each, "adapter_bytes")) for each in configurations], NONE),
    ]
    for key in comparison.keys:
        if key in SECONDARY and key != comparison.primary_metric:
            continue
        columns.append(column(title(key), [_mean(each, key) for each in configurations], _of_base(comparison, key)))
    if any(len(each.arms) > 1 for each in configurations):
        key = comparison.primary_metric
        columns.append(column(f"spread of {title(key)}", [_spread(each, key) for each in configurations]))
    columns += [
        column("time", [format_seconds(_largest(each, "seconds")) for each in configurations]),
        column("peak memory", [format_bytes(_largest(each, "peak_memory_bytes")) for each in configurations]),
    ]
    return columns


def _table(columns: Sequence[_Column], configurations: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(Text(column.heading), justify="right", overflow="fold", no_wrap=column.leading)
    for row in range(configurations + 1):
        table.add_row(*(column.cells[row] for column in columns), style="dim" if row == configurations else None)
    return table


def _headline(comparison: Comparison) -> str:
    key = comparison.primary_metric
    better = "greater" if comparison.greater_is_better else "smaller"
    head = f"{comparison.experiment}: {title(key)} on the evaluation rows, {better} is better"
    if not comparison.ranking:
        return f"{head}; no arm has a result yet"
    best = comparison.ranking[0]
    mean, rank = best.metric(key), format_param(best.params.get(RANK))
    assert mean is not None, "a ranked configuration has a value"
    extreme = "highest" if comparison.greater_is_better else "lowest"
    return f"{head}; {extreme}: r = {rank} with {with_error(key, mean.value, mean.stderr)}"


def _notes(comparison: Comparison, shown: int) -> list[Text]:
    notes = []
    if (left := len(comparison.configurations) - shown) > 0:
        notes.append(Text(f"... and {left:,} more configurations; --csv and --json list all", style="yellow"))
    notes.append(
        Text(
            "★ best arm; # place by the mean over seeds; ± one standard error over the evaluation rows (and over "
            "seeds if there are several). More metrics: --json.",
            style="dim",
        )
    )
    best = comparison.best
    if best is not None:
        where = f" is {best.model_uri}" if best.model_uri else " is not registered"
        notes.append(Text(f"The best arm {best.spec_hash[:12]} (run {best.run_id}){where}", style="dim"))
    if not comparison.base:
        notes.append(Text("The bare base has not been evaluated yet.", style="yellow"))
    pruned = [arm for arm in comparison.arms if arm.pruned]
    failed = [arm for arm in comparison.arms if arm.status != "FINISHED" and not arm.pruned]
    named = [*failed[:MOST_NAMED], *(pruned if len(pruned) <= MOST_PRUNED else [])]
    for arm in named:
        status = "stopped early" if arm.pruned else arm.status
        note = f"r = {format_param(arm.params.get(RANK))}, arm {arm.spec_hash[:12]}: {status}"
        notes.append(Text(note + (f": {arm.reason}" if arm.reason else ""), style="dim" if arm.pruned else "red"))
    if (left := len(failed) - MOST_NAMED) > 0:
        notes.append(Text(f"... and {left:,} more arms without a result; --csv and --json list all", style="yellow"))
    for arm in comparison.silent[:MOST_NAMED]:
        note = (
            f"r = {format_param(arm.params.get(RANK))}, arm {arm.spec_hash[:12]} is not ranked: "
            f"{title(comparison.primary_metric)} has a value for only "
            f"{arm.metrics[comparison.primary_metric].n:,} examples"
        )
        notes.append(Text(note, style="red"))
    if len(pruned) > MOST_PRUNED:
        rungs = Counter((arm.reason or "").partition(":")[0] for arm in pruned)
        by_rung = ", ".join(f"{count:,} {rung}" for rung, count in rungs.items())
        notes.append(Text(f"{len(pruned):,} arms stopped early: {by_rung}; reasons: --csv and --json", style="dim"))
    return notes


def _place(configuration: Configuration, place: int | None, best: ArmRecord | None) -> str:
    if place is not None:
        return f"★ {place}" if best in configuration.arms else str(place)
    statuses = dict.fromkeys("pruned" if arm.pruned else arm.status.lower() for arm in configuration.arms)
    return "/".join(statuses) if set(statuses) != {"finished"} else NONE


def _style(configuration: Configuration, best: ArmRecord | None) -> str:
    if best is not None and best in configuration.arms:
        return "bold green"
    if all(arm.pruned for arm in configuration.arms):
        return "dim"
    return "" if configuration.finished else "red"


def _seeds(configuration: Configuration) -> str:
    done, wanted = len(configuration.finished), len(configuration.arms)
    return str(done) if done == wanted else f"{done} of {wanted}"


def _mean(configuration: Configuration, key: str) -> str:
    summary = configuration.metric(key)
    if summary is None:
        return NONE
    return with_error(key, summary.value, summary.stderr)


def _spread(configuration: Configuration, key: str) -> str:
    summary = configuration.metric(key)
    return format_value(key, summary.spread)[0] if summary is not None else NONE


def _of_base(comparison: Comparison, key: str) -> str:
    metric = comparison.base.get(key)
    return NONE if metric is None else with_error(key, metric.value, metric.stderr)


def _largest(configuration: Configuration, field: str) -> int | None:
    values = [value for arm in configuration.arms if (value := getattr(arm, field)) is not None]
    return max(values, default=None)


def comparison_json(comparison: Comparison, finding: Findings) -> dict[str, object]:
    """Return what `compare --json` prints and the sweep's run stores as `comparison.json`.

    `importance` is null while no arm has a result, and has a `reason` instead of `settings` if it is unknown.
    """
    places = {id(each): place for place, each in enumerate(comparison.ranking, start=1)}
    found = costs(finding)
    on_front = {id(point.configuration) for point in found.points if point.on_front} if found is not None else set()
    configurations = []
    for each in comparison.configurations:
        mean = each.metric(comparison.primary_metric)
        configurations.append(
            {
                "params": dict(each.params),
                "spec_hashes": [arm.spec_hash for arm in each.arms],
                "place": places.get(id(each)),
                "seeds": mean.seeds if mean else 0,
                "mean": mean.value if mean else None,
                "stderr": mean.stderr if mean else None,
                "spread": mean.spread if mean else None,
                "on_front": id(each) in on_front,
            }
        )
    return {
        **comparison.to_json(),
        "answer": finding.answer.to_json(),
        "configurations": configurations,
        "importance": _importance(comparison, finding),
    }


def comparison_csv(comparison: Comparison) -> str:
    """Return one line per arm, in the order of the comparison; missing values are empty."""
    params = list(dict.fromkeys(key for arm in comparison.arms for key in arm.params))
    facts = ("spec_hash", "run_id", "status", "pruned", "reason", "model_uri")
    sizes = ("adapter_parameters", "adapter_bytes", "seconds", "peak_memory_bytes", "effective_rank", "rank_99")
    places = {arm.spec_hash: place for place, each in enumerate(comparison.ranking, start=1) for arm in each.arms}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    results = [column for key in comparison.keys for column in (key, f"{key}.stderr", f"{key}.n")]
    writer.writerow(["place", *facts, *params, *results, *sizes])
    for arm in comparison.arms:
        values: list[object] = [places.get(arm.spec_hash), *(getattr(arm, name) for name in facts)]
        values += [arm.params.get(key) for key in params]
        for key in comparison.keys:
            metric = arm.metrics.get(key)
            values += [None] * 3 if metric is None else [metric.value, metric.stderr, metric.n]
        writer.writerow([*values, *(getattr(arm, name) for name in sizes)])
    return text.getvalue()


def _importance(comparison: Comparison, finding: Findings) -> dict[str, object] | None:
    if not finding.configurations:
        return None
    found = importance(comparison, finding)
    if isinstance(found, str):
        return {"reason": found}
    return {"settings": [asdict(share) for share in found.shares], "seeds": found.noise}
