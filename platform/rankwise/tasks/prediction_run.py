"""A prediction in MLflow: what was answered by which versions, as a run of the experiment `predictions`."""

from __future__ import annotations

from typing import Any

from rankwise.exceptions import JobError, TrackingError
from rankwise.jobs.job import Job
from rankwise.tasks.prediction import Prediction
from rankwise.tasks.session import Session, token_of
from rankwise.tracking.datasets import DatasetRecord
from rankwise.tracking.linking import link_inputs
from rankwise.tracking.provenance import collect
from rankwise.tracking.registry import JOB
from rankwise.tracking.runs import Run

EXPERIMENT = "predictions"
_LAST_TRY_S = 10.0


def record_prediction(session: Session, job: Job, work: Prediction, result: dict[str, Any]) -> str | None:
    """Show a prediction whose output is there. The output is what counts: without a server it is not shown.

    Args:
        session: The child.
        job: The job that put the output together; another attempt writes to the same run.
        work: What it says.
        result: What its row is to keep.

    Returns:
        The run; None where the tracking server does not answer.

    Raises:
        JobError: Another worker has taken over the job.
    """
    run: Run | None = None
    try:
        run = _open(session, job, work)
        manifest = work.manifest
        run.input(
            DatasetRecord(
                name=work.source.name,
                digest=manifest.request["input"],
                source=str(work.source),
                source_type="local",
                context="predict",
                profile={"rows": manifest.rows},
            )
        )
        run.metrics({f"predict.{key}": float(result[key]) for key in ("rows", "failed", "completion_tokens")}, 0)
        run.tags({"rankwise.output_sha256": result["sha256"]})
        run.json({**manifest.to_json(), "output": str(work.output)}, "prediction.json")
        store = session.context.store
        resolved = [store.registry.resolve(uri) for uri in manifest.models.values() if uri.startswith("models:")]
        run.flush()
        link_inputs(store.client, run.run_id, {each.model_id for each in resolved if each.model_id is not None})
        run.end("FINISHED")
    except TrackingError as error:
        session.voice.warn(f"{work.output} is there, and MLflow does not show all of it: {error}")
        if run is None:
            return None
        # What it lacks is delivered when the server answers; the work has ended all the same.
        run.end("FINISHED", f"not all of the prediction is shown: {error}", timeout=_LAST_TRY_S)
    except BaseException:
        if run is not None:
            run.leave(timeout=0.0)
        raise
    return run.run_id


def _open(session: Session, job: Job, work: Prediction) -> Run:
    """The job's run: a new one, or that of an earlier attempt."""
    store, request = session.context.store, work.manifest.request
    if job.mlflow_run_id is not None:
        return store.resume_run(job.mlflow_run_id, system_metrics=False, attempt=job.attempts, fence=session.fence(job))
    noted, may_speak = False, session.fence(job)
    decoding = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "prompt")
    run = store.start_run(
        store.experiment(EXPERIMENT),
        work.output.name,
        params={
            "input": str(work.source),
            "input_digest": request["input"],
            "output": str(work.output),
            "models": ", ".join(sorted(set(work.manifest.models.values()))),
            **{key: request.get(key) for key in decoding},
        },
        tags={**collect().tags(), JOB: job.id},
        kind="predict",
        system_metrics=False,
        attempt=job.attempts,
        # Nobody else knows of it before it is noted.
        fence=lambda: not noted or may_speak(),
    )
    noted = session.context.queue.set_run(token_of(job), run.run_id)
    if not noted:
        run.end("KILLED", "another worker has taken over this prediction")
        raise JobError(f"{job.title} was taken over by another worker")
    return run
