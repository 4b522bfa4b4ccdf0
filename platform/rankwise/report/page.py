"""Read what the report of a comparison shows, and make the page: a bounded number of requests, however many arms.

That view shows a page in a frame with `sandbox="allow-scripts"` (mlflow 3.17): scripts run, other pages cannot be
opened, and the page's own address is `blob:`, so that links cannot be relative to it. All content is there without
scripts; one of 5 kB sorts, filters and pages the table of arms and points the links to the MLflow server.

- Sections of the report: rank by rank, quality, other settings, costs, arms without a result.
- The report of a sweep as one HTML page: it opens from a disk and in MLflow's artifact view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from rankwise.evaluation.compare import ArmRecord, Comparison, title, with_error
from rankwise.evaluation.gather import TRAIN_LOSS, read_curves, read_layers
from rankwise.evaluation.smallest_rank import RankFinding
from rankwise.report.cells import Cell, Column, Row, arm_table, count_text, endings, rank_table
from rankwise.report.costs import cost_charts, costs, front_rows, importance
from rankwise.report.quality import chosen_arms, curve_charts, layer_chart, rank_charts, slice_charts, use_chart
from rankwise.report.shell import render
from rankwise.tracking.query import MetricPoint

if TYPE_CHECKING:
    from rankwise.tracking.store import Store

_MOST_FRONT = 12


@dataclass(frozen=True, kw_only=True)
class Part:
    """A section of the page; `id` is what links in the page name."""

    id: str
    title: str
    texts: Sequence[str] = ()
    charts: Sequence[Markup] = ()
    heads: Sequence[Column] = ()
    rows: Sequence[Row] = ()
    notes: Sequence[str] = ()


def by_rank(comparison: Comparison, finding: RankFinding) -> Part:
    """The best configuration of each rank against the best of all, and the rule."""
    heads, rows = rank_table(comparison, finding)
    text = "For each rank its best configuration, against the best of all; at most: the limit of the test."
    return Part(id="ranks", title="Rank by rank", texts=[text], heads=heads, rows=rows, notes=finding.notes)


def quality(comparison: Comparison, finding: RankFinding) -> list[Part]:
    """Quality against the rank and against other settings, and which settings matter."""
    several = any(len(each.finished) > 1 for each in finding.configurations)
    over = "the evaluation rows and over seeds; small marks are single seeds" if several else "the evaluation rows"
    parts = [
        Part(
            id="quality",
            title="Quality against rank",
            texts=[f"Bars: one standard error, over {over}. A ring marks the configuration of the first line."],
            charts=rank_charts(comparison, finding),
        )
    ]
    if charts := slice_charts(comparison, finding):
        parts.append(
            Part(id="slices", title="Other settings", texts=["One mark for each configuration."], charts=charts)
        )
    if len(finding.configurations) > 1:
        parts.append(_importance(comparison, finding))
    return parts


def _importance(comparison: Comparison, finding: RankFinding) -> Part:
    found = importance(comparison, finding)
    name = "Which settings matter"
    if isinstance(found, str):
        return Part(id="importance", title=name, texts=[found])
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
        "analysis of variance); p by the F test, corrected for the number of settings (Holm). What settings do only in "
        "combination is in none of the shares."
    )
    return Part(id="importance", title=name, heads=heads, rows=rows, notes=[note])


def against_costs(comparison: Comparison, finding: RankFinding) -> list[Part]:
    """Quality against size, memory and time; nothing where fewer than two configurations have costs."""
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
        Part(
            id="costs",
            title="Quality against cost",
            texts=[text],
            charts=cost_charts(comparison, finding, found),
            heads=heads,
            rows=rows,
            notes=[left] if len(table) > _MOST_FRONT else [],
        )
    ]


def without_result(comparison: Comparison) -> Part | None:
    """Arms that failed, were pruned or wait, by reason; None where all have a result."""
    heads, rows = endings(comparison)
    if not rows:
        return None
    text = "They take no part in means, tests and charts of results."
    return Part(id="without", title="Arms without a result", texts=[text], heads=heads, rows=rows)


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
    curves: Mapping[str, Mapping[str, Sequence[MetricPoint]]]
    curve_keys: Sequence[str]
    layer_arms: Sequence[ArmRecord]
    layers: Mapping[str, Mapping[int, float]]
    mlflow: str
    command: str
    version: str


def make_page(material: Material) -> str:
    """The whole page."""
    comparison, finding = material.comparison, material.finding
    base = comparison.base.get(comparison.primary_metric)
    parts = [without_result(comparison)]
    if finding is not None:
        parts = [
            by_rank(comparison, finding),
            *quality(comparison, finding),
            *parts,
            *against_costs(comparison, finding),
        ]
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


def _rank_use(material: Material) -> Part | None:
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
    return Part(id="use", title="Is the rank used?", texts=[text], charts=drawn)


def _curves(material: Material) -> Part | None:
    charts = curve_charts(material.comparison, material.curve_arms, material.curves, material.curve_keys)
    if not charts:
        return None
    shown, count = len(material.curve_arms), len(material.comparison.arms)
    of = f"{shown} of {count:,} arms: the best of each rank, and some of the others. " if shown < count else ""
    text = f"{of}Dashed: arms that were cut off (pruned, failed, cancelled)."
    return Part(id="curves", title="Learning curves", texts=[text], charts=charts)


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
