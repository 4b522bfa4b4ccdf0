"""Sections of the report: rank by rank, quality, other settings, costs, arms without a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rankwise.evaluation.compare import Comparison
from rankwise.evaluation.labels import title
from rankwise.evaluation.rank_finding import RankFinding
from rankwise.evaluation.report_cells import Cell, Column, Row, endings, rank_table
from rankwise.evaluation.report_costs import cost_charts, costs, front_rows
from rankwise.evaluation.report_importance import importance
from rankwise.evaluation.report_quality import rank_charts, slice_charts

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
