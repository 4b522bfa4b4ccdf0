"""Results of an assessment in MLflow: a run for each model, linked to its LoggedModel and to the rows."""

from __future__ import annotations

from rankwise.evaluation.predictions import prediction_rows
from rankwise.evaluation.summary import to_tracking
from rankwise.tasks.assess import Assessment
from rankwise.tasks.context import Context
from rankwise.tracking.linking import link_metrics
from rankwise.tracking.provenance import collect


def publish_assessment(context: Context, assessment: Assessment, *, note: str = "") -> dict[str, str]:
    """Write every model's results to a run of its own.

    Args:
        context: The stores.
        assessment: What they did.
        note: What is special about it (another quantization), for the runs' names.

    Returns:
        The run id of each model, by its name in the assessment.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    spec = assessment.setting.spec
    experiment_id = context.store.experiment(spec.name, spec)
    names = list(assessment.setting.arm.evaluation.metrics)
    runs: dict[str, str] = {}
    for name, model in assessment.models.items():
        uri, evaluation, record = model.uri, model.evaluation, model.rows.inputs[-1]
        run = context.store.start_run(
            experiment_id,
            f"evaluation of {uri or name}{note}",
            params={
                "model": uri or name,
                "data": record.source,
                "base_model": model.base.source,
                "base_model_revision": model.base.revision,
                "quantization": model.base.quantization,
            },
            tags={
                **collect().tags(),
                "rankwise.model_uri": uri,
                "rankwise.base_fingerprint": model.base.fingerprint,
            },
            # Never "base": `compare` takes the last run of that kind for the base on the definition's own rows.
            kind="evaluate",
            system_metrics=False,
        )
        run.input(record)
        values = to_tracking(evaluation.metrics)
        run.metrics(values, 0)
        rows = prediction_rows(evaluation, names, log_examples=spec.tracking.log_examples)
        run.table(rows, "predictions.json")
        run.flush()
        model_id = None if uri is None else context.store.registry.resolve(uri).model_id
        if model_id is not None:
            link_metrics(context.store.client, run.run_id, model_id, list(values), 0, dataset=record)
        run.end("FINISHED")
        runs[name] = run.run_id
    return runs
