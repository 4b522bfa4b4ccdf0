"""Markdown notes that head a run or a model version in MLflow's UI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import ExperimentSpec

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
