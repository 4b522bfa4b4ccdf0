"""The end of a trained arm: its adapter is logged and registered, and its job is reported. Every step is repeatable."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rankwise.flavor as flavor
from rankwise.data.prompting import Reading
from rankwise.digests import content_digest
from rankwise.exceptions import StorageError, TrackingError
from rankwise.jobs.job import Job, Outcome
from rankwise.modeling.adapter import StoredAdapter, read_adapter
from rankwise.modeling.base import LoadedBase
from rankwise.report.anatomy import PAGE_NAME, TABLE_NAME, rank_metrics, trained_anatomy, trained_page
from rankwise.tasks.adaptive_sweep import paused_result
from rankwise.tasks.arm_run import ClaimedArm
from rankwise.tasks.promote import ROW_DIGESTS_TAG
from rankwise.tasks.session import ComputedArm, Session, token_of
from rankwise.tracking.registry import JOB
from rankwise.tracking.run import Run
from rankwise.training.arm import ArmOutcome
from rankwise.training.checkpoint import Checkpoints

logger = logging.getLogger(__name__)
INTERRUPTED = "interrupted"
_DRAIN_S = 60.0


def finish_arm(session: Session, base: LoadedBase, arm: ClaimedArm, run: Run, outcome: ArmOutcome) -> None:
    """Publish a trained arm and report its job; it waits if the tracking server is unavailable."""
    session.phase("upload")
    if not session.may_publish(arm.job) or outcome.status == "stopped":
        leave_arm(session, arm, run, timeout=_DRAIN_S / 6)
    elif outcome.status == "paused":
        run.tags({"rankwise.reason": f"paused after step {outcome.steps}, until the other arms reach it"})
        run.leave()
        session.report(arm.job, Outcome.PAUSED, result=paused_result(arm.work, outcome.steps, outcome.metrics))
    elif (adapter := _chosen(arm, outcome)[0]) is None:
        run.end("FAILED", outcome.reason)
        session.report(arm.job, Outcome.FATAL, error=outcome.reason)
    else:
        if outcome.reason is not None and outcome.status == "finished":
            run.tags({"rankwise.reason": outcome.reason})
        _publish_or_wait(session, base, arm, run, outcome, adapter)


def leave_arm(session: Session, arm: ClaimedArm, run: Run, *, timeout: float = 0.0) -> None:
    """Report an arm that stops here: cancelled, interrupted, or taken over by another worker."""
    if not session.claims.holds(token_of(arm.job)):
        # Publish nothing: the job's new owner writes to the same run.
        run.leave(timeout=0.0)
        session.report(arm.job, Outcome.PREEMPTED)
        return
    cancelled = session.claims.cancelled(token_of(arm.job))
    run.end("KILLED", "cancelled" if cancelled else INTERRUPTED, timeout=timeout)
    session.report(arm.job, Outcome.CANCELLED if cancelled else Outcome.PREEMPTED)


def publish_again(session: Session, base: LoadedBase, arms: Sequence[ClaimedArm], runs: dict[int, Run]) -> None:
    """Retry publishing arms that wait for the tracking server."""
    for arm in arms:
        outcome = stored_outcome(session, base, arm)
        if outcome is None:
            # The files were removed, so the arm must be trained again.
            reason = "the trained adapter is no longer on this machine"
            session.computed.pop(arm.job.id, None)
            runs.pop(arm.job.id).end("FAILED", reason)
            session.report(arm.job, Outcome.FAILED, error=reason)
            continue
        with arm.logged():
            finish_arm(session, base, arm, runs[arm.job.id], outcome)
        del runs[arm.job.id]


def stored_outcome(session: Session, base: LoadedBase, arm: ClaimedArm) -> ArmOutcome | None:
    """Outcome of an arm that is finished but not published, if its files are on this machine."""
    composition = _row(session, arm.job).get("composition")
    if composition is None:
        return None
    return Checkpoints(session.settings.checkpoints, composition, base).outcomes().get(arm.spec_hash)


def _row(session: Session, job: Job) -> dict[str, Any]:
    computed = session.computed_by(job)
    return (job.result or {}) if computed is None else computed.row


def _chosen(arm: ClaimedArm, outcome: ArmOutcome) -> tuple[Path | None, int]:
    """The adapter to register and its step."""
    if outcome.status == "nonfinite":
        return None, outcome.steps
    if arm.work.arm.checkpoint == "best" and outcome.best is not None and outcome.best_step is not None:
        return outcome.best, outcome.best_step
    return outcome.adapter, outcome.steps


def _publish_or_wait(
    session: Session, base: LoadedBase, arm: ClaimedArm, run: Run, outcome: ArmOutcome, adapter: Path
) -> None:
    job, name = arm.job, arm.work.run_name
    step = _chosen(arm, outcome)[1]
    computed = session.computed_by(job)
    stored: StoredAdapter | None = None
    if computed is None:
        stored = read_adapter(adapter)
        anatomy = trained_anatomy(stored, base)
        run.metrics(
            {
                "adapter.parameters": float(stored.parameters),
                "adapter.bytes": float(stored.weights.stat().st_size),
                "train.seconds": outcome.seconds,
                "train.peak_memory_bytes": float(outcome.peak_memory_bytes),
                **rank_metrics(anatomy),
            },
            outcome.steps,
        )
        run.text(trained_page(anatomy, base, name), PAGE_NAME)
        run.json(anatomy.to_dict(), TABLE_NAME)
        composition = _composition(session, job) or _row(session, job)["composition"]
        upload_record = {"steps": outcome.steps, "composition": list(composition)}
        computed = session.computed[job.id] = ComputedArm(token=token_of(job), row=upload_record)
        session.claims.retry_while_held(
            token_of(job), lambda: session.context.queue.uploading(token_of(job), upload_record)
        )
    try:
        if not run.drain(_DRAIN_S):
            raise TrackingError("the tracking server does not accept the run's metrics")
        if not session.may_publish(job):
            run.leave(timeout=0.0)
            session.report(job, Outcome.PREEMPTED)
            return
        result = {**_register(session, base, arm, run, stored or adapter, step), "steps": outcome.steps}
    except (TrackingError, StorageError) as error:
        computed.run = run
        session.wait_for_upload(job, f"{name} is trained but not yet registered: {error}")
        return
    delivered = run.end("FINISHED")
    del session.computed[job.id]
    session.report(job, Outcome.SUCCEEDED, result=result)
    logger.info("trained in %.0f s and stored as %s", outcome.seconds, result["model_uri"])
    waiting = "" if delivered else " (metrics wait in the outbox: the tracking server does not answer)"
    session.reporter.done(f"{name} trained in {outcome.seconds:,.0f} s: {result['model_uri']}{waiting}")


def _composition(session: Session, job: Job) -> tuple[str, ...] | None:
    return next(
        (composition.spec_hashes for composition in reversed(session.compositions) if job.id in composition.open), None
    )


def _register(
    session: Session, base: LoadedBase, arm: ClaimedArm, run: Run, adapter: Path | StoredAdapter, step: int
) -> dict[str, Any]:
    """Log and register the adapter, or adopt the version that this job has already registered."""
    registry, name = session.context.store.registry, arm.work.register_as
    existing = registry.of_job(name, arm.job.id, run.run_id) if name is not None else []
    if existing:
        uri, model_id = existing[0].uri, existing[0].model_id
    else:
        info = flavor.log_adapter(
            adapter,
            base,
            arm.rows.renderer.tokenizer,
            registered_model_name=name,
            run_id=run.run_id,
            step=step,
            system=arm.work.arm.dataset.system,
            reading=Reading.of(arm.work.arm.dataset, arm.rows.examples.mapping),
            tags={
                JOB: arm.job.id,
                "rankwise.attempt": arm.job.attempts,
                "rankwise.spec_hash": arm.work.arm.spec_hash,
                "rankwise.experiment": arm.work.experiment,
                ROW_DIGESTS_TAG: content_digest(arm.row_digests),
            },
        )
        model_id = info.model_id
        uri = f"models:/{name}/{info.registered_model_version}" if name is not None else f"models:/{model_id}"
    run.tags({"rankwise.model_uri": uri})
    return {"model_uri": uri, "model_id": model_id, "run_id": run.run_id, "adapter_step": step}
