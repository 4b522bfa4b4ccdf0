"""The HTML report of a sweep: reads what it shows with a bounded number of requests, and builds the sections.

The page opens from a disk and in MLflow's artifact view. That view (mlflow 3.17) uses a frame with
`sandbox="allow-scripts"`: scripts run, but other pages cannot be opened, and the page's address is `blob:`, so links
cannot be relative. All content is visible without scripts; a script of 5 kB sorts, filters and pages the table of arms
and sets the links to the MLflow server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from rankwise.evaluation.compare import ArmRecord, Comparison, title, with_error
from rankwise.evaluation.findings import Findings
from rankwise.evaluation.gather import TRAIN_LOSS, read_curves, read_layers
from rankwise.report.answer_charts import difference_chart, narrowing_charts
from rankwise.report.costs import cost_charts, costs, front_rows, importance
from rankwise.report.quality import chosen_arms, curve_charts, layer_chart, rank_charts, slice_charts, use_chart
from rankwise.report.render import render
from rankwise.report.tables import Cell, Column, ReportRow, arm_table, count_text, endings, rank_table
from rankwise.tracking.query import MetricPoint

if TYPE_CHECKING:
    from rankwise.tracking.store import Store

_MOST_FRONT = 12


@dataclass(frozen=True, kw_only=True)
class ReportSection:
    """A section of the page; the navigation links to `id`. The one chart of a `lead` is wide."""

    id: str
    title: str
    texts: Sequence[str] = ()
    charts: Sequence[Markup] = ()
    heads: Sequence[Column] = ()
    rows: Sequence[ReportRow] = ()
    notes: Sequence[str] = ()
    lead: bool = False


def answer_parts(comparison: Comparison, finding: Findings) -> list[ReportSection]:
    """The answer: differences to the largest rank, how limits narrow, and the ranks in numbers."""
    answer, decision = finding.answer, finding.answer.decision
    heads, rows = rank_table(comparison, finding)
    if decision is None or answer.plan is None:
        text = "Means over seeds and evaluation rows. They describe these adapters; they are no statement about ranks."
        return [ReportSection(id="ranks", title="Rank by rank", texts=[text], heads=heads, rows=rows)]
    largest = f"r = {decision.reference.rank:g}"
    parts = [
        ReportSection(
            id="answer",
            title=f"How much worse than {largest}?",
            texts=[
                "A rank is enough if its upper limit is within the margin (the grey band), and not enough if its lower "
                "limit is beyond it. Small marks are single seeds."
            ],
            charts=[difference_chart(answer, decision)],
            lead=True,
            heads=heads,
            rows=rows,
            notes=answer.notes,
        )
    ]
    if charts := narrowing_charts(answer, decision):
        text = (
            "The limits with the first two, three, ... seeds. Only the planned looks are tests; the picture shows what "
            "more seeds bring."
        )
        parts.append(ReportSection(id="seeds", title="How limits narrow with seeds", texts=[text], charts=charts))
    return parts


def quality(comparison: Comparison, finding: Findings) -> list[ReportSection]:
    """Quality against the rank and other settings, and which settings matter."""
    several = any(len(each.finished) > 1 for each in finding.configurations)
    over = "the evaluation rows and seeds; small marks are single seeds" if several else "the evaluation rows"
    ring = " A ring marks the rank named in the first line." if finding.chosen else ""
    parts = [
        ReportSection(
            id="quality",
            title="Quality against rank",
            texts=[f"Bars: one standard error over {over}.{ring}"],
            charts=rank_charts(comparison, finding),
        )
    ]
    if charts := slice_charts(comparison, finding):
        parts.append(
            ReportSection(id="slices", title="Other settings", texts=["One mark per configuration."], charts=charts)
        )
    if len(finding.configurations) > 1:
        parts.append(_importance(comparison, finding))
    return parts


def _importance(comparison: Comparison, finding: Findings) -> ReportSection:
    found = importance(comparison, finding)
    name = "Which settings matter"
    if isinstance(found, str):
        return ReportSection(id="importance", title=name, texts=[found])
    rows = []
    for share in found.shares:
        remark = "" if share.real else "not distinguishable from noise"
        rows.append(
            ReportRow(
                cells=[
                    _text(share.name),
                    _bar(share.share, share.real),
                    _plain("< 0.001" if share.p < 0.001 else f"{share.p:.3f}"),
                    _text(remark),
                ]
            )
        )
    if found.noise is not None:
        rows.append(
            ReportRow(cells=[_text("seeds"), _bar(found.noise, False), _plain(""), _text("noise of the means")])
        )
    heads = [Column("setting", "text"), Column("share of the variance", "text"), Column("p"), Column("", "text")]
    note = (
        f"A setting's share of the variance of {title(finding.key)} between {found.configurations:,} configurations, "
        "with the other settings held fixed, minus what it would explain by chance (epsilon squared of an additive "
        "analysis of variance). p is from the F test, corrected for the number of settings (Holm). Effects of "
        "combinations of settings are in none of the shares."
    )
    return ReportSection(id="importance", title=name, heads=heads, rows=rows, notes=[note])


def against_costs(comparison: Comparison, finding: Findings) -> list[ReportSection]:
    """Quality against size, memory and time; nothing if fewer than two configurations have costs."""
    found = costs(finding)
    if found is None:
        return []
    table = front_rows(comparison, finding, found)
    heads = [Column(name, "text" if name == "configuration" else "") for name in table[0]]
    rows = [
        ReportRow(
            cells=[Cell(text=value, kind="text wide" if name == "configuration" else "") for name, value in row.items()]
        )
        for row in table[:_MOST_FRONT]
    ]
    text = (
        "The Pareto front: configurations that are not dominated, i.e. no other one is at least as good in quality, "
        "size, memory and time and better in one of them. This compares means and ignores noise."
    )
    left = f"Only the {_MOST_FRONT} with the smallest adapters are shown, of {len(table)} on the front."
    return [
        ReportSection(
            id="costs",
            title="Quality against cost",
            texts=[text],
            charts=cost_charts(comparison, finding, found),
            heads=heads,
            rows=rows,
            notes=[left] if len(table) > _MOST_FRONT else [],
        )
    ]


def without_result(comparison: Comparison) -> ReportSection | None:
    """Arms that failed, were pruned or are pending, by reason; None if all have a result."""
    heads, rows = endings(comparison)
    if not rows:
        return None
    text = "They are excluded from means, tests and charts of results."
    return ReportSection(id="without", title="Arms without a result", texts=[text], heads=heads, rows=rows)


def _text(text: str) -> Cell:
    return Cell(text=text, kind="text")


def _plain(text: str) -> Cell:
    return Cell(text=text)


def _bar(share: float, real: bool) -> Cell:
    width = max(1, round(160 * share))
    drawn = Markup(
        '<svg class="bar{}" width="160" height="12" aria-hidden="true"><rect width="{}" height="12" rx="2"/></svg>'
    )
    return Cell(text=f"{100 * share:.0f} %", kind="text", drawn=drawn.format("" if real else " none", width))


@dataclass(frozen=True, kw_only=True)
class Material:
    """The data of a page.

    Attributes:
        comparison: The arms.
        finding: Its configurations and answer.
        curve_arms: Arms whose curves are shown.
        curves: Their points by run id and key.
        curve_keys: Keys to draw, in this order.
        layer_arms: Arms whose layers are shown.
        layers: Effective rank by run id and layer.
        mlflow: The MLflow server that links of a saved page lead to.
        command: The command that makes the page again.
        version: rankwise's.
    """

    comparison: Comparison
    finding: Findings
    curve_arms: Sequence[ArmRecord]
    curves: Mapping[str, Mapping[str, Sequence[MetricPoint]]]
    curve_keys: Sequence[str]
    layer_arms: Sequence[ArmRecord]
    layers: Mapping[str, Mapping[int, float]]
    mlflow: str
    command: str
    version: str


def make_page(material: Material) -> str:
    """Return the whole page."""
    comparison, finding = material.comparison, material.finding
    base = comparison.base.get(comparison.primary_metric)
    parts = [without_result(comparison)]
    if finding.configurations:
        parts = [
            *answer_parts(comparison, finding),
            *quality(comparison, finding),
            *parts,
            *against_costs(comparison, finding),
        ]
    parts += [_rank_use(material), _curves(material)]
    return render(
        "report.html.j2",
        page_title=f"{comparison.experiment}: comparison across ranks",
        experiment=comparison.experiment,
        headline=finding.answer.text,
        hint=finding.answer.hint or "",
        counts=count_text(comparison.arms),
        metric=title(comparison.primary_metric).capitalize(),
        better="greater" if comparison.greater_is_better else "smaller",
        base=with_error(comparison.primary_metric, base.value, base.stderr) if base is not None else "",
        parts=[part for part in parts if part is not None],
        arms=arm_table(comparison, finding),
        mlflow=material.mlflow,
        footer=f"rankwise {material.version}. Made by: {material.command}",
    )


def _rank_use(material: Material) -> ReportSection | None:
    charts = [
        use_chart(material.comparison),
        layer_chart(material.comparison, material.layer_arms, material.layers),
    ]
    drawn = [chart for chart in charts if chart is not None]
    if not drawn:
        return None
    text = (
        "The effective rank of a delta is the exponential of the entropy of its normalised singular values (Roy and "
        "Vetterli 2007): the number of directions that it really uses. If it stays below r, a smaller r may be enough."
    )
    return ReportSection(id="use", title="Is the rank used?", texts=[text], charts=drawn)


def _curves(material: Material) -> ReportSection | None:
    charts = curve_charts(material.comparison, material.curve_arms, material.curves, material.curve_keys)
    if not charts:
        return None
    shown, count = len(material.curve_arms), len(material.comparison.arms)
    of = f"{shown} of {count:,} arms: the best of each rank and some others. " if shown < count else ""
    text = f"{of}Dashed: arms that ended early (pruned, failed, cancelled)."
    return ReportSection(id="curves", title="Learning curves", texts=[text], charts=charts)


LOCAL_UI = "http://127.0.0.1:5000"
"""The address of `rankwise ui`."""
_MOST_LAYER_LINES = 12


def report_page(store: Store, comparison: Comparison, finding: Findings, *, command: str, version: str) -> str:
    """Return the HTML page of a comparison.

    Args:
        store: The store of its arms.
        comparison: The arms.
        finding: The result of `findings`.
        command: The command that makes the page again.
        version: rankwise's.

    Raises:
        TrackingError: The store is unreachable.
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


def _of_ranks(comparison: Comparison, finding: Findings) -> list[ArmRecord]:
    """An arm of the best configuration of each rank; without results, of each rank with a finished arm."""
    if finding.configurations:
        found = [each.finished[0] for each in finding.by_rank]
    else:
        found = [each.finished[0] for each in comparison.configurations if each.finished]
    return found[:_MOST_LAYER_LINES]
