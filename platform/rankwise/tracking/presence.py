"""Which of many runs and LoggedModels a store has, in few requests. Functions raise `TrackingError`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import ViewType

from rankwise.tracking.connection import paged
from rankwise.tracking.query import without_collector

# Ids in one filter, which is one condition of an SQL statement.
_BATCH = 500


def present_runs(client: MlflowClient, experiment_ids: Collection[str], run_ids: Collection[str]) -> dict[str, bool]:
    """The runs that exist in these experiments, and whether each is active; deleted ones can be restored."""
    active: dict[str, bool] = {}
    for batch in _batches(run_ids):
        filters = f"attributes.run_id IN ({_listed(batch)})"

        def fetch(token: str | None, filters: str = filters) -> Any:
            with without_collector():
                return client.search_runs(
                    sorted(experiment_ids),
                    filter_string=filters,
                    run_view_type=ViewType.ALL,
                    max_results=_BATCH,
                    page_token=token,
                )

        for run in paged("looking for the runs of succeeded jobs", fetch) if experiment_ids else ():
            active[run.info.run_id] = run.info.lifecycle_stage == "active"
    return active


def present_models(client: MlflowClient, experiment_ids: Collection[str], model_ids: Collection[str]) -> set[str]:
    """The LoggedModels of these that exist in these experiments."""
    present: set[str] = set()
    for batch in _batches(model_ids):
        filters = f"model_id IN ({_listed(batch)})"

        def fetch(token: str | None, filters: str = filters) -> Any:
            return client.search_logged_models(
                sorted(experiment_ids), filter_string=filters, max_results=_BATCH, page_token=token
            )

        models = paged("looking for the models of succeeded jobs", fetch) if experiment_ids else ()
        present |= {model.model_id for model in models}
    return present


def _batches(ids: Iterable[str]) -> Iterator[list[str]]:
    # Ids of MLflow are letters, digits, `-` and `_`; nothing else can exist, or be put into a filter.
    ordered = sorted({value for value in ids if value.replace("-", "").replace("_", "").isalnum()})
    for start in range(0, len(ordered), _BATCH):
        yield ordered[start : start + _BATCH]


def _listed(ids: Iterable[str]) -> str:
    return ", ".join(f"'{value}'" for value in ids)
