"""What a finished sweep leaves: comparison and report on the parent run, and the alias on the best version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rankwise import __version__
from rankwise.evaluation.compare import ArmRecord, Comparison
from rankwise.evaluation.gather import gather
from rankwise.evaluation.labels import SECONDARY, format_value, title
from rankwise.evaluation.plots import rank_figure
from rankwise.evaluation.rank_finding import RankFinding
from rankwise.evaluation.report_cells import model_route, run_route
from rankwise.evaluation.report_export import comparison_json
from rankwise.evaluation.report_make import report_page
from rankwise.evaluation.report_page import headline
from rankwise.evaluation.verdict import smallest_rank
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import ExperimentSpec
from rankwise.tasks.context import Context
from rankwise.tasks.waiting import with_waiting
from rankwise.tracking.descriptions import arm_note, sweep_note, table
from rankwise.tracking.runs import Run

REPORT = "report.html"
"""The page among the artifacts of the sweep's run."""

# A note holds 8,000 characters.
_MOST_ROWS = 25


def publish_report(
    context: Context, spec: ExperimentSpec, arms: Sequence[ArmSpec], parent: Run, command: str
) -> Comparison:
    """Compare the arms of this sweep, store comparison and report, and point the alias to the best version.

    Args:
        context: The stores.
        spec: The definition.
        arms: The sweep's arms; others of the same experiment are left out.
        parent: The sweep's run.
        command: How to run it again, for the note.
    """
    # Another sweep of the experiment may have been submitted since, with a primary metric and a base of its own.
    known = gather(context.store, spec.name, everything=True, parent_run_id=parent.run_id)
    everything = with_waiting(context.store, context.queue, known, everything=True)
    hashes = {arm.spec_hash for arm in arms}
    comparison = replace(everything, arms=tuple(arm for arm in everything.arms if arm.spec_hash in hashes))
    finding = smallest_rank(context.store, comparison)
    parent.json(comparison_json(comparison, finding), "comparison.json")
    parent.text(report_page(context.store, comparison, finding, command=command, version=__version__), REPORT)
    parent.figure(rank_figure(comparison), "plots/quality-by-rank.png")
    parent.describe(sweep_note(spec, arms, command=command, results=_results(comparison, finding)))
    best = comparison.best
    if best is not None:
        _crown(context, spec, best, {arm.spec_hash: arm for arm in arms}[best.spec_hash])
    return comparison


def _crown(context: Context, spec: ExperimentSpec, best: ArmRecord, arm: ArmSpec) -> None:
    """Describe the best version and give it the alias."""
    if spec.register is None or best.model_uri is None:
        return
    resolved = context.store.registry.resolve(best.model_uri)
    if resolved.version is None:
        return
    name, version = resolved.version.name, resolved.version.version
    values = {key: metric.value for key, metric in best.metrics.items() if metric.value is not None}
    context.store.registry.describe_version(name, version, arm_note(arm, model_uri=best.model_uri, metrics=values))
    if spec.register.alias is not None:
        context.store.registry.set_alias(name, spec.register.alias, version)
        context.voice.done(f"models:/{name}@{spec.register.alias} is version {version} (r = {arm.lora.r})")


def _results(comparison: Comparison, finding: RankFinding | None) -> str:
    """The comparison as Markdown, best configuration first; its links work in MLflow's UI wherever that is served."""
    keys = [key for key in comparison.keys if key not in SECONDARY]
    head = ["r", *(title(key) for key in keys), "run", "model"]
    finished = [arm for configuration in comparison.ranking for arm in configuration.finished]
    rows = []
    for arm in finished[:_MOST_ROWS]:
        cells = [" ± ".join(filter(None, format_value(key, *_value(arm, key)))) for key in keys]
        run = f"[{arm.run_id[:8]}](#/{run_route(comparison, arm)})"
        model = f"[{arm.model_uri}](#/{model_route(comparison, arm)})" if arm.model_uri else ""
        rows.append([str(arm.params.get("lora.r", "")), *cells, run, model])
    base = [
        " ± ".join(filter(None, format_value(key, comparison.base[key].value, comparison.base[key].stderr)))
        if key in comparison.base
        else ""
        for key in keys
    ]
    text = f"**{headline(comparison, finding)}** The artifact `{REPORT}` has the rule, plots and curves.\n\n"
    text += table(head, [*rows, ["base alone", *base, "", ""]])
    if len(finished) > _MOST_ROWS:
        text += f"\n\n... and {len(finished) - _MOST_ROWS:,} more."
    pruned = sum(arm.pruned for arm in comparison.arms)
    if pruned:
        arms = "arm was" if pruned == 1 else "arms were"
        text += f"\n\n{pruned} {arms} stopped early; their runs say at which step and why."
    return text


def _value(arm: ArmRecord, key: str) -> tuple[float | None, float | None]:
    metric = arm.metrics.get(key)
    return (None, None) if metric is None else (metric.value, metric.stderr)
