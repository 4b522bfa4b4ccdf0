"""The report of a sweep as one HTML page: it opens from a disk and in MLflow's artifact view.

That view shows a page in a frame with `sandbox="allow-scripts"` (mlflow 3.17): scripts run, other pages cannot be
opened, and the page's own address is `blob:`, so that links cannot be relative to it. All content is there without
scripts; one of 5 kB sorts, filters and pages the table of arms and points the links to the MLflow server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rankwise.evaluation.compare import ArmRecord, Comparison
from rankwise.evaluation.labels import title, with_error
from rankwise.evaluation.report_cells import Cell, Column, Row, arm_table, endings, rank_table
from rankwise.evaluation.report_costs import cost_charts, costs, front_rows
from rankwise.evaluation.report_importance import importance
from rankwise.evaluation.report_learning import curve_charts, layer_chart, use_chart
from rankwise.evaluation.report_quality import rank_charts, slice_charts
from rankwise.evaluation.report_shell import render
from rankwise.evaluation.report_words import count_text
from rankwise.evaluation.verdict import RankFinding
from rankwise.tracking.query import Point

_MOST_FRONT = 12


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a page shows.

    Attributes:
        comparison: The arms.
        finding: The smallest rank; None while no arm has a result.
        curve_arms: Arms whose curves are shown.
        curves: Their points by run id and key.
        curve_keys: Keys to draw, in this order.
        layer_arms: Arms whose layers are shown.
        layers: Effective rank by run id and layer.
        mlflow: Where links lead on a saved page; the artifact view knows better.
        command: How to make the page again.
        version: Of rankwise.
    """

    comparison: Comparison
    finding: RankFinding | None
    curve_arms: Sequence[ArmRecord]
    curves: Mapping[str, Mapping[str, Sequence[Point]]]
    curve_keys: Sequence[str]
    layer_arms: Sequence[ArmRecord]
    layers: Mapping[str, Mapping[int, float]]
    mlflow: str
    command: str
    version: str


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A section of the page; `id` is what links in the page name."""

    id: str
    title: str
    texts: Sequence[str] = ()
    charts: Sequence[Markup] = ()
    heads: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    notes: Sequence[str] = ()


def make_page(material: Material) -> str:
    """The whole page."""
    comparison, finding = material.comparison, material.finding
    base = comparison.base.get(comparison.primary_metric)
    parts = [_ended(comparison)]
    if finding is not None:
        parts = [_by_rank(comparison, finding), *_quality(comparison, finding), *parts, *_costs(comparison, finding)]
    parts += [_rank_use(material), _curves(material)]
    return render(
        "report.html.j2",
        page_title=f"{comparison.experiment}: comparison across ranks",
        experiment=comparison.experiment,
        headline=headline(comparison, finding),
        one_seed=_one_seed(finding),
        counts=count_text(comparison.arms),
        metric=title(comparison.primary_metric).capitalize(),
        better="greater" if comparison.greater_is_better else "smaller",
        base=with_error(comparison.primary_metric, base.value, base.stderr) if base is not None else "",
        parts=[part for part in parts if part is not None],
        arms=arm_table(comparison, finding),
        mlflow=material.mlflow,
        footer=f"rankwise {material.version}. Made by: {material.command}",
    )


def headline(comparison: Comparison, finding: RankFinding | None) -> str:
    """The first line: the smallest rank, or why there is none."""
    if finding is not None:
        return finding.headline
    if all(arm.status in {"FAILED", "KILLED"} for arm in comparison.arms):
        return "No rank can be named: no arm has finished."
    return "No rank can be named yet: no arm has a result."


def _one_seed(finding: RankFinding | None) -> str:
    if finding is None or finding.verdict.seeds or len(finding.configurations) < 2:
        return ""
    return (
        "How much results move from one seed to another is not known, so the first line is about these adapters, not "
        "about their settings. Error bars show the noise over examples only."
    )


def _by_rank(comparison: Comparison, finding: RankFinding) -> _Part:
    heads, rows = rank_table(comparison, finding)
    text = "For each rank its best configuration, against the best of all; at most: the limit of the test."
    return _Part(id="ranks", title="Rank by rank", texts=[text], heads=heads, rows=rows, notes=finding.notes)


def _quality(comparison: Comparison, finding: RankFinding) -> list[_Part]:
    several = any(len(each.finished) > 1 for each in finding.configurations)
    over = "the evaluation rows and over seeds; small marks are single seeds" if several else "the evaluation rows"
    parts = [
        _Part(
            id="quality",
            title="Quality against rank",
            texts=[f"Bars: one standard error, over {over}. A ring marks the configuration of the first line."],
            charts=rank_charts(comparison, finding),
        )
    ]
    if charts := slice_charts(comparison, finding):
        parts.append(
            _Part(id="slices", title="Other settings", texts=["One mark for each configuration."], charts=charts)
        )
    if len(finding.configurations) > 1:
        parts.append(_importance(comparison, finding))
    return parts


def _importance(comparison: Comparison, finding: RankFinding) -> _Part:
    found = importance(comparison, finding)
    name = "Which settings matter"
    if isinstance(found, str):
        return _Part(id="importance", title=name, texts=[found])
    rows = []
    for share in found.shares:
        told = "" if share.real else "not told apart from noise"
        rows.append(
            Row(
                cells=[
                    _text(share.name),
                    _bar(share.share, share.real),
                    _plain("< 0.001" if share.p < 0.001 else f"{share.p:.3f}"),
                    _text(told),
                ]
            )
        )
    if found.noise is not None:
        rows.append(Row(cells=[_text("seeds"), _bar(found.noise, False), _plain(""), _text("noise of the means")]))
    heads = [Column("setting", "text"), Column("share of the variance", "text"), Column("p"), Column("", "text")]
    note = (
        f"Of the variance of {title(finding.key)} between {found.configurations:,} configurations, the share that a "
        "setting explains, the others being held, less what it would by chance (epsilon squared of an additive "
        "analysis of variance); p by the F test. What settings do only in combination is in none of the shares."
    )
    return _Part(id="importance", title=name, heads=heads, rows=rows, notes=[note])


def _costs(comparison: Comparison, finding: RankFinding) -> list[_Part]:
    found = costs(finding)
    if found is None:
        return []
    table = front_rows(comparison, finding, found)
    heads = [Column(name, "text" if name == "configuration" else "") for name in table[0]]
    rows = [
        Row(
            cells=[Cell(text=value, kind="text wide" if name == "configuration" else "") for name, value in row.items()]
        )
        for row in table[:_MOST_FRONT]
    ]
    text = (
        "The front: configurations that no other one beats or equals in quality, size, memory and time at once while "
        "being better in one of them, by their means, without regard to noise."
    )
    left = f"The {_MOST_FRONT} with the smallest adapters of the {len(table)} on the front."
    return [
        _Part(
            id="costs",
            title="Quality against cost",
            texts=[text],
            charts=cost_charts(comparison, finding, found),
            heads=heads,
            rows=rows,
            notes=[left] if len(table) > _MOST_FRONT else [],
        )
    ]


def _rank_use(material: Material) -> _Part | None:
    charts = [
        use_chart(material.comparison),
        layer_chart(material.comparison, material.layer_arms, material.layers),
    ]
    drawn = [chart for chart in charts if chart is not None]
    if not drawn:
        return None
    text = (
        "The effective rank of a delta is the exponential of the entropy of its normalised singular values (Roy and "
        "Vetterli 2007): how many directions it really uses. Where it stays below r, a smaller r might do."
    )
    return _Part(id="use", title="Is the rank used?", texts=[text], charts=drawn)


def _curves(material: Material) -> _Part | None:
    charts = curve_charts(material.comparison, material.curve_arms, material.curves, material.curve_keys)
    if not charts:
        return None
    shown, count = len(material.curve_arms), len(material.comparison.arms)
    of = f"{shown} of {count:,} arms: the best of each rank, and some of the others. " if shown < count else ""
    text = f"{of}Dashed: arms that were cut off (pruned, failed, cancelled)."
    return _Part(id="curves", title="Learning curves", texts=[text], charts=charts)


def _ended(comparison: Comparison) -> _Part | None:
    heads, rows = endings(comparison)
    if not rows:
        return None
    text = "They take no part in means, tests and charts of results."
    return _Part(id="without", title="Arms without a result", texts=[text], heads=heads, rows=rows)


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
