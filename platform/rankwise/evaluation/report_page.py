"""The report of a sweep as one HTML page: it opens from a disk and in MLflow's artifact view.

That view shows a page in a frame with `sandbox="allow-scripts"` (mlflow 3.17): scripts run, other pages cannot be
opened, and the page's own address is `blob:`, so that links cannot be relative to it. All content is there without
scripts; one of 5 kB sorts, filters and pages the table of arms and points the links to the MLflow server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankwise.evaluation.compare import ArmRecord, Comparison
from rankwise.evaluation.labels import title, with_error
from rankwise.evaluation.rank_finding import RankFinding
from rankwise.evaluation.report_cells import arm_table
from rankwise.evaluation.report_learning import curve_charts, layer_chart, use_chart
from rankwise.evaluation.report_sections import Part, against_costs, by_rank, quality, without_result
from rankwise.evaluation.report_shell import render
from rankwise.evaluation.report_words import count_text
from rankwise.tracking.query import Point


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
