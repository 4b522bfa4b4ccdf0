"""What may be said when an adapter is stored or loaded, as one value each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.models import ModelSignature

from rankwise.assets.base import ResolvedBase
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.signature import EXAMPLE
from rankwise.settings import Settings


@dataclass(frozen=True, kw_only=True)
class PackageOptions:
    """What goes into a model directory beside the adapter.

    Attributes:
        system: A system prompt to put before bare texts.
        metrics: Results for the card.
        signature: In place of the flavor's own, which has no input schema and the parameters of generation.
        input_example: Stored as it is; no model is loaded for it. None for none.
        pip_requirements: In place of the flavor's own.
        extra_pip_requirements: Added to them.
        metadata: Free values for MLflow's `metadata`.
    """

    system: str | None = None
    metrics: Mapping[str, float] | None = None
    signature: ModelSignature | None = None
    input_example: Any = field(default_factory=lambda: EXAMPLE)
    pip_requirements: Sequence[str] | None = None
    extra_pip_requirements: Sequence[str] = ()
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LogOptions(PackageOptions):
    """How an adapter is logged to MLflow.

    Attributes:
        run_id: The run that it is of; the active run by default, none without one.
        experiment_id: For a model without a run.
        tags: Set on the LoggedModel and on the version when they are created.
        step: That the adapter is of.
        metrics: Results: tags of the version, lines of the card, and, with a run, the LoggedModel's own metrics where
            the run has them at `step`.
        description: Of the version.
        tracking_uri: Of the MLflow store; MLflow's current one by default.
        model_type: MLflow's.
    """

    run_id: str | None = None
    experiment_id: str | None = None
    tags: Mapping[str, Any] | None = None
    step: int = 0
    description: str | None = None
    tracking_uri: str | None = None
    model_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the base of a stored adapter is found and loaded; see `rankwise.flavor.load_model`."""

    settings: Settings
    base_model: str | Path | ResolvedBase | None = None
    quantization: QuantizationSpec | None = None
    allow_base_mismatch: bool = False
    device: str | None = None
