"""Markdown notes that head a run or a model version in MLflow's UI.

MLflow keeps shared views of an experiment as tags of it: the state of the page as JSON, by a key that the link names.

- The experiment's table in MLflow's UI with the columns that tell arms apart, under a link of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient

from rankwise.compat.mlflow import SHARED_VIEW
from rankwise.experiment.arm import ArmSpec, param_name
from rankwise.experiment.schema import ExperimentSpec, keys_of
from rankwise.tracking.errors import tracking_errors

# A tag holds 8,000 characters; a sweep of hundreds of arms is shown in part.
_MOST_ARMS = 40


def sweep_note(
    spec: ExperimentSpec, arms: Sequence[ArmSpec], *, command: str | None = None, results: str | None = None
) -> str:
    """The note of a sweep's parent run.

    Args:
        spec: The definition.
        arms: What it expands to.
        command: How to run it again.
        results: Markdown that is put first once there are results.
    """
    parts = [f"# {spec.name}"]
    # MLflow folds a note after some lines: the answer comes before the question.
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
    parts.append(_setting(arms[0]) if arms else "")
    parts.append(f"Ranked by `{spec.evaluation.primary_metric}`.")
    if command:
        parts.append(f"Run it again:\n\n```\n{command}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def arm_note(arm: ArmSpec, *, model_uri: str | None = None, metrics: Mapping[str, float] | None = None) -> str:
    """The note of an arm's run, or of the model version that it made.

    Args:
        arm: The arm.
        model_uri: Where its adapter is registered.
        metrics: Results by key.
    """
    lora = arm.lora
    modules = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    parts = [f"# LoRA r = {lora.r}, alpha = {lora.lora_alpha:g} on {modules}"]
    if model_uri:
        parts.append(f'Registered as `{model_uri}`; load it with `rankwise.flavor.load_model("{model_uri}")`.')
    if metrics:
        parts.append(table(["metric", "value"], [[f"`{key}`", f"{value:.6g}"] for key, value in metrics.items()]))
    parts.append(_setting(arm))
    parts.append(table(["setting", "value"], [[f"`{key}`", _text(value)] for key, value in arm.params.items()]))
    parts.append(f"Spec hash `{arm.spec_hash}`.")
    return "\n\n".join(parts) + "\n"


def base_note(arm: ArmSpec) -> str:
    """The note of the run that evaluates the bare base, so that every table has that row."""
    return f"# The base alone\n\nThe same evaluation without an adapter.\n\n{_setting(arm)}\n"


def varying_params(arms: Sequence[ArmSpec]) -> list[str]:
    """Keys of `params` that differ between the arms, in their order; of a single arm its rank."""
    if len(arms) == 1:
        return ["lora.r"]
    keys = dict.fromkeys(key for arm in arms for key in arm.params)
    return [key for key in keys if len({arm.params.get(key) for arm in arms}) > 1]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _setting(arm: ArmSpec) -> str:
    quantization = arm.quantization
    if quantization.load_in_4bit:
        double = " with double quantization" if quantization.bnb_4bit_use_double_quant else ""
        how = f"{quantization.bnb_4bit_quant_type.upper()}{double}"
    else:
        how = "8-bit" if quantization.load_in_8bit else "not quantized"
    revision = f" at `{arm.base_model_revision}`" if arm.base_model_revision else ""
    return f"Base `{arm.base_model}`{revision}, {how}. Data `{arm.dataset.train}`."


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_KEY = "rankwise"
VIEW_TAG = f"{SHARED_VIEW}{_KEY}"
_ALWAYS = ("lora.r", "lora.lora_alpha", "lora.lora_dropout")
# In pixels: settings are short numbers, of metrics the name is long.
_NARROW, _WIDE = 100, 130


def table_view(spec: ExperimentSpec) -> str:
    """The value of `VIEW_TAG`: rank, alpha, dropout and whatever else the sweep varies, then what was measured.

    The order of runs stays MLflow's own, by time: in any other it does not nest arms under their sweep.
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
    """The address of that view, from the UI's root on."""
    return f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={_KEY}"


def latest_views(client: MlflowClient, most: int) -> list[tuple[str, str]]:
    """Names of the experiments that were worked on last, and the addresses of their tables.

    Raises:
        TrackingError: The store cannot be read.
    """
    with tracking_errors("listing the experiments"):
        found = client.search_experiments(max_results=most, order_by=["last_update_time DESC"])
    return [(each.name, view_route(each.experiment_id)) for each in found if VIEW_TAG in each.tags]
