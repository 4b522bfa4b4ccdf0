"""The experiment's table in MLflow's UI with the columns that tell arms apart, under a link of its own.

MLflow keeps shared views of an experiment as tags of it: the state of the page as JSON, by a key that the link names.
"""

from __future__ import annotations

import json

from mlflow import MlflowClient

from rankwise.experiment.arm import param_name
from rankwise.experiment.metric_names import keys_of
from rankwise.experiment.schema import ExperimentSpec
from rankwise.tracking.errors import tracking_errors

_KEY = "rankwise"
VIEW_TAG = f"mlflow.sharedViewState.{_KEY}"
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
