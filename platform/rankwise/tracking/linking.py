"""Runs and LoggedModels: results of a run as results of the model that it made, and models that a run has used."""

from __future__ import annotations

from collections.abc import Collection

from mlflow import MlflowClient
from mlflow.entities import LoggedModelInput, Metric

from rankwise.tracking.datasets import DatasetRecord
from rankwise.tracking.errors import tracking_errors


def link_metrics(
    client: MlflowClient,
    run_id: str,
    model_id: str,
    keys: Collection[str],
    step: int,
    *,
    dataset: DatasetRecord | None = None,
) -> None:
    """Give a LoggedModel the points that a run has at `step`.

    Of several at `step` the last one counts. Points keep their own times: MLflow takes one with another time for a
    second point of the curve.

    Args:
        client: Of the store.
        run_id: The run; what it buffers must have been delivered.
        model_id: The LoggedModel.
        keys: Which metrics; those that the run does not have at `step` are passed over.
        step: Of the run.
        dataset: What was evaluated on.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    with tracking_errors(f"linking results to {model_id}"):
        points = []
        for key in keys:
            there = [point for point in client.get_metric_history(run_id, key) if point.step == step]
            if not there:
                continue
            last = max(there, key=lambda point: point.timestamp)
            points.append(
                Metric(
                    key=key,
                    value=last.value,
                    timestamp=last.timestamp,
                    step=step,
                    run_id=run_id,
                    model_id=model_id,
                    dataset_name=None if dataset is None else dataset.name,
                    dataset_digest=None if dataset is None else dataset.short_digest,
                )
            )
        if points:
            client.log_batch(run_id, metrics=points)


def link_inputs(client: MlflowClient, run_id: str, model_ids: Collection[str]) -> None:
    """Show LoggedModels as what a run has used. May be repeated.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    if model_ids:
        with tracking_errors(f"linking models to run {run_id}"):
            client.log_inputs(run_id, models=[LoggedModelInput(model_id) for model_id in sorted(model_ids)])
