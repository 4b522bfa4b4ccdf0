"""What a finished sweep leaves: the comparison and its plots on the parent run, and the alias on the best version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rankwise.evaluation.compare import ArmRecord, Comparison
from rankwise.evaluation.gather import gather
from rankwise.evaluation.labels import format_value, title
from rankwise.evaluation.plots import rank_figure, rank_plot, to_html
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import ExperimentSpec
from rankwise.tasks.context import Context
from rankwise.tasks.waiting import with_waiting
from rankwise.tracking.descriptions import arm_note, sweep_note, table
from rankwise.tracking.runs import Run


def publish_report(
    context: Context, spec: ExperimentSpec, arms: Sequence[ArmSpec], parent: Run, command: str
) -> Comparison:
    """Compare the arms of this sweep, store the comparison and the plots, and point the alias to the best version.

    Args:
        context: The stores.
        spec: The definition.
        arms: The sweep's arms; others of the same experiment are left out.
        parent: The sweep's run.
        command: How to run it again, for the note.
    """
    known = gather(context.store, spec.name, everything=True)
    everything = with_waiting(context.store, context.queue, known, everything=True)
    hashes = {arm.spec_hash for arm in arms}
    comparison = replace(everything, arms=tuple(arm for arm in everything.arms if arm.spec_hash in hashes))
    parent.json(comparison.to_json(), "comparison.json")
    parent.figure(rank_figure(comparison), "plots/quality-by-rank.png")
    parent.text(to_html(rank_plot(comparison)), "plots/quality-by-rank.html")
    parent.describe(sweep_note(spec, arms, command=command, results=_results(comparison)))
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


def _results(comparison: Comparison) -> str:
    """The comparison as a Markdown table, best configuration first."""
    keys = comparison.keys
    head = ["r", *(title(key) for key in keys), "model"]
    rows = []
    for configuration in comparison.ranking:
        for arm in configuration.finished:
            cells = [" ± ".join(filter(None, format_value(key, *_value(arm, key)))) for key in keys]
            rows.append([str(arm.params.get("lora.r", "")), *cells, f"`{arm.model_uri or ''}`"])
    base = [
        " ± ".join(filter(None, format_value(key, comparison.base[key].value, comparison.base[key].stderr)))
        if key in comparison.base
        else ""
        for key in keys
    ]
    text = table(head, [*rows, ["base alone", *base, ""]])
    pruned = sum(arm.pruned for arm in comparison.arms)
    if pruned:
        arms = "arm was" if pruned == 1 else "arms were"
        text += f"\n\n{pruned} {arms} stopped early; their runs say at which step and why."
    return text


def _value(arm: ArmRecord, key: str) -> tuple[float | None, float | None]:
    metric = arm.metrics.get(key)
    return (None, None) if metric is None else (metric.value, metric.stderr)
