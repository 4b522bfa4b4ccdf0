"""Notes and table views in MLflow's UI: Markdown for runs and versions, columns for experiments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient

from rankwise.compat.mlflow import SHARED_VIEW
from rankwise.experiment.arm import ArmSpec, param_name
from rankwise.experiment.metric_names import keys_of
from rankwise.experiment.schema import ExperimentSpec
from rankwise.tracking.connection import tracking_errors

# A tag holds 8,000 characters; a sweep of hundreds of arms is shown in part.
_MOST_ARMS = 40


def sweep_note(
    spec: ExperimentSpec, arms: Sequence[ArmSpec], *, command: str | None = None, results: str | None = None
) -> str:
    """Return the note of a sweep's parent run; `command` runs it again, `results` is Markdown to show first."""
    parts = [f"# {spec.name}"]
    # MLflow folds long notes, so the results come first.
    if results:
        parts.append(results.strip())
    if spec.description:
        parts.append(spec.description.strip())
    varying = varying_params(arms)
    shown = arms[:_MOST_ARMS]
    rows = [[f"`{arm.short}`", *(_text(arm.params.get(key, "")) for key in varying)] for arm in shown]
    arms_part = f"## {len(arms)} {'arm' if len(arms) == 1 else 'arms'}\n\n{table(['arm', *varying], rows)}"
    if len(arms) > len(shown):
        arms_part += f"\n\n... and {len(arms) - len(shown)} more"
    parts.append(arms_part)
    parts.append(_setup_text(arms[0]) if arms else "")
    ranked = f"Ranked by `{spec.evaluation.primary_metric}`."
    if spec.answer is not None:
        ranked += f" Margin of the answer: {spec.answer.margin:g}, at {100 * spec.answer.confidence:g} % confidence."
    parts.append(ranked)
    if command:
        parts.append(f"Run it again:\n\n```\n{command}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def arm_note(arm: ArmSpec, *, model_uri: str | None = None, metrics: Mapping[str, float] | None = None) -> str:
    """Return the note of an arm's run or model version; `model_uri` is its registered adapter."""
    lora = arm.lora
    modules = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    parts = [f"# LoRA r = {lora.r}, alpha = {lora.lora_alpha:g} on {modules}"]
    if model_uri:
        parts.append(f'Registered as `{model_uri}`; load it with `rankwise.flavor.load_model("{model_uri}")`.')
    if metrics:
        parts.append(table(["metric", "value"], [[f"`{key}`", f"{value:.6g}"] for key, value in metrics.items()]))
    parts.append(_setup_text(arm))
    parts.append(table(["setting", "value"], [[f"`{key}`", _text(value)] for key, value in arm.params.items()]))
    parts.append(f"Spec hash `{arm.spec_hash}`.")
    return "\n\n".join(parts) + "\n"


def base_note(arm: ArmSpec) -> str:
    """Return the note of the run that evaluates the base model without an adapter."""
    return f"# The base model\n\nThe same evaluation without an adapter.\n\n{_setup_text(arm)}\n"


def varying_params(arms: Sequence[ArmSpec]) -> list[str]:
    """Return the keys of `params` that differ between the arms, in order; for a single arm, its rank."""
    if len(arms) == 1:
        return ["lora.r"]
    keys = dict.fromkeys(key for arm in arms for key in arm.params)
    return [key for key in keys if len({arm.params.get(key) for arm in arms}) > 1]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _setup_text(arm: ArmSpec) -> str:
    quantization = arm.quantization
    if quantization.load_in_4bit:
        double = " with double quantization" if quantization.bnb_4bit_use_double_quant else ""
        how = f"{quantization.bnb_4bit_quant_type.upper()}{double}"
    else:
        how = "8-bit" if quantization.load_in_8bit else "not quantized"
    revision = f" at `{arm.base_model_revision}`" if arm.base_model_revision else ""
    return f"Base `{arm.base_model}`{revision}, {how}. Data `{arm.dataset.train_text}`."


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_KEY = "rankwise"
VIEW_TAG = f"{SHARED_VIEW}{_KEY}"
_ALWAYS = ("lora.r", "lora.lora_alpha", "lora.lora_dropout")
# Pixels. Params are short numbers, metrics have long names.
_NARROW, _WIDE = 100, 130


def table_view(spec: ExperimentSpec) -> str:
    """Return the value of `VIEW_TAG`: columns for rank, alpha, dropout, swept params and metrics.

    Runs keep MLflow's default order, by time: with any other, it does not nest arms under their sweep.
    """
    swept = [*spec.sweep.parameters, *(path for arm in spec.sweep.arms for path in arm)]
    params = dict.fromkeys(map(param_name, [*_ALWAYS, *swept]))
    metrics = dict.fromkeys([*keys_of(spec.evaluation.metrics), "adapter.parameters"])
    columns = [
        *(f"params.`{name}`" for name in params),
        *(f"metrics.`{name}`" for name in metrics),
        "attributes.`Models`",
    ]
    widths = {column: _NARROW if column.startswith("params.") else _WIDE for column in columns}
    return json.dumps({"selectedColumns": columns, "columnOrder": columns, "columnWidths": widths})


def view_route(experiment_id: str) -> str:
    """Return the path of that view, relative to the UI's root."""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={_KEY}"


def latest_views(client: MlflowClient, most: int) -> list[tuple[str, str]]:
    """Return name and view path of the most recently updated experiments."""
    with tracking_errors("listing the experiments"):
        experiments = client.search_experiments(max_results=most, order_by=["last_update_time DESC"])
    return [
        (experiment.name, view_route(experiment.experiment_id))
        for experiment in experiments
        if VIEW_TAG in experiment.tags
    ]
