"""Train a claimed pack: base and rows, the engine, then for each arm its adapter, its registration and its end."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rankwise.flavor as flavor
from rankwise.assets.weights import read_header
from rankwise.exceptions import JobError, RankwiseError
from rankwise.experiment.arm import ArmSpec
from rankwise.jobs.job import Job, Outcome
from rankwise.modeling.base import LoadedBase
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.context import Context
from rankwise.tasks.curves import Curves
from rankwise.tasks.heartbeat import LEASE_S, Heartbeat
from rankwise.tasks.outcomes import outcome_of
from rankwise.tasks.payload import Work
from rankwise.tasks.prepare import find_sources
from rankwise.tasks.rows import Rows, RowsCache
from rankwise.tracking.descriptions import arm_note
from rankwise.tracking.provenance import Provenance, collect
from rankwise.tracking.registry import JOB
from rankwise.tracking.runs import Run
from rankwise.training.checkpoint import remove_composition
from rankwise.training.pack import train_pack
from rankwise.training.values import ArmOutcome, ArmTask

logger = logging.getLogger(__name__)
INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """One claimed job with all that belongs to it."""

    job: Job
    token: str
    work: Work
    rows: Rows
    run: Run


def train_claimed(context: Context, jobs: Sequence[Job], bases: BaseHolder, rows: RowsCache) -> None:
    """Train the jobs of one claim together and finish each of them.

    A problem of one arm (a loss that is not finite, a lost token) ends that arm only. An error of the whole pack ends
    all of them: for good where a person has to mend something, otherwise to be tried again.

    Raises:
        RankwiseError: What a person has to mend.
        Exception: A bug; the jobs are noted as failed first.
    """
    tokens = {job.id: job.token for job in jobs if job.token is not None}
    arms: list[_Arm] = []
    with Heartbeat(context.queue, list(tokens.values())) as heart:
        try:
            works = [Work.of(job) for job in jobs]
            sources = [find_sources(work.arm, context.settings, context.voice) for work in works]
            base = bases.get(sources[0].base, works[0].arm.quantization)
            tables = [rows.get(work.arm, source, base.tokenizer) for work, source in zip(works, sources, strict=True)]
            provenance = collect()
            for job, work, table in zip(jobs, works, tables, strict=True):
                run = _open_run(context, job, work, table, base, provenance)
                arms.append(_Arm(job=job, token=tokens[job.id], work=work, rows=table, run=run))
            outcomes = _train(context, heart, base, arms)
            for arm in arms:
                _finish(context, heart, base, arm, outcomes[arm.work.arm.spec_hash])
                heart.release(arm.token)
        except BaseException as error:
            _give_up(context, heart, tokens, arms, error)
            raise
    if all(outcome.status == "finished" for outcome in outcomes.values()):
        remove_composition(context.settings.checkpoints, list(outcomes))


def _open_run(context: Context, job: Job, work: Work, rows: Rows, base: LoadedBase, provenance: Provenance) -> Run:
    arm = work.arm
    if job.mlflow_run_id is not None:
        run = context.store.resume_run(job.mlflow_run_id)
    else:
        run = context.store.start_run(
            work.experiment_id,
            work.run_name,
            parent=work.parent_run_id,
            params=arm.params,
            tags=provenance.tags(),
            description=arm_note(arm),
            kind="train",
            spec_hash=arm.spec_hash,
        )
        if not context.queue.set_run(job.token or "", run.run_id):
            run.end("KILLED", "another worker has taken over this arm")
            raise JobError(f"job {job.id} was taken over by another worker")
        for record in rows.inputs:
            run.input(record)
        run.text(work.definition, "experiment.yaml")
        run.json(provenance.to_dict(), "provenance.json")
    run.tags(
        {
            JOB: job.id,
            "rankwise.attempt": job.attempts,
            "rankwise.host": context.worker.host,
            "rankwise.device": str(base.device),
            "rankwise.compute_dtype": base.dtype_reason,
            "rankwise.base_fingerprint": base.fingerprint.digest,
            "rankwise.reason": "",
        }
    )
    return run


def _train(context: Context, heart: Heartbeat, base: LoadedBase, arms: Sequence[_Arm]) -> dict[str, ArmOutcome]:
    tasks = []
    for arm in arms:
        spec = arm.work.arm
        tasks.append(
            ArmTask(
                spec=spec,
                train=arm.rows.train,
                evaluation=arm.rows.eval if len(arm.rows.eval) else None,
                init_adapter=_initial_adapter(context, spec),
            )
        )
    steps = max(arm.work.arm.training.optimizer_steps(len(arm.rows.train)) for arm in arms)
    names = ", ".join(arm.work.run_name for arm in arms)

    tokens = {arm.work.arm.spec_hash: arm.token for arm in arms}

    def should_leave(spec_hash: str) -> bool:
        token = tokens[spec_hash]
        return not heart.holds(token) or heart.cancelled(token)

    with context.voice.noted(f"training {names}", steps, "steps") as (advance, note):
        curves = Curves({arm.work.arm.spec_hash: (arm.run, arm.work.arm) for arm in arms}, advance, note)
        return train_pack(
            base,
            tasks,
            directory=context.settings.checkpoints,
            observer=curves,
            should_stop=context.stop.is_set,
            should_leave=should_leave,
        )


def _initial_adapter(context: Context, arm: ArmSpec) -> Path | None:
    if arm.init_from is None:
        return None
    target = context.settings.cache / "adapters" / arm.init_from.replace("models:/", "").replace("/", "-")
    return flavor.download_adapter(arm.init_from, target)


def _finish(context: Context, heart: Heartbeat, base: LoadedBase, arm: _Arm, outcome: ArmOutcome) -> None:
    if not heart.holds(arm.token) or not context.queue.holds(arm.token):
        arm.run.end("KILLED", "another worker has taken over this arm")
        return
    if outcome.status == "stopped":
        cancelled = heart.cancelled(arm.token)
        arm.run.end("KILLED", "cancelled" if cancelled else INTERRUPTED)
        context.queue.finish(arm.token, Outcome.CANCELLED if cancelled else Outcome.PREEMPTED)
        return
    best = arm.work.arm.checkpoint == "best" and outcome.best is not None
    adapter = outcome.best if best else outcome.adapter
    if outcome.status == "nonfinite" or adapter is None:
        arm.run.end("FAILED", outcome.reason)
        context.queue.finish(arm.token, Outcome.FATAL, error=outcome.reason)
        context.voice.fail(f"{arm.work.run_name}: {outcome.reason}")
        return
    weights = adapter / "adapter_model.safetensors"
    steps = outcome.best_step if best and outcome.best_step is not None else outcome.steps
    summary = {
        "adapter.parameters": float(sum(math.prod(entry.shape) for entry in read_header(weights))),
        "adapter.bytes": float(weights.stat().st_size),
        "train.seconds": outcome.seconds,
        "train.peak_memory_bytes": float(outcome.peak_memory_bytes),
    }
    arm.run.metrics(summary, outcome.steps)
    context.queue.uploading(arm.token, {"steps": outcome.steps})
    result = {**_publish(context, base, arm, adapter, steps), "steps": outcome.steps}
    delivered = arm.run.end("FINISHED")
    if not context.queue.finish(arm.token, Outcome.SUCCEEDED, result=result):
        raise JobError(f"job {arm.job.id} was taken over by another worker after it had been registered")
    where = result["model_uri"]
    waiting = "" if delivered else " (points wait in the outbox: the tracking server does not answer)"
    context.voice.done(f"{arm.work.run_name} trained in {outcome.seconds:,.0f} s: {where}{waiting}")


def _publish(context: Context, base: LoadedBase, arm: _Arm, adapter: Path, steps: int) -> dict[str, Any]:
    """Log and register the adapter; a version that this job has registered already is adopted."""
    registry, name = context.store.registry, arm.work.register_as
    existing = registry.find_by_tag(name, JOB, str(arm.job.id)) if name is not None else []
    if existing:
        uri, model_id = existing[0].uri, existing[0].model_id
    else:
        arm.run.flush()
        info = flavor.log_adapter(
            adapter,
            base,
            arm.rows.renderer.tokenizer,
            registered_model_name=name,
            run_id=arm.run.run_id,
            step=steps,
            system=arm.work.arm.dataset.system,
            tags={
                JOB: arm.job.id,
                "rankwise.attempt": arm.job.attempts,
                "rankwise.spec_hash": arm.work.arm.spec_hash,
                "rankwise.experiment": arm.work.experiment,
            },
        )
        model_id = info.model_id
        uri = f"models:/{name}/{info.registered_model_version}" if name is not None else f"models:/{model_id}"
    arm.run.tags({"rankwise.model_uri": uri})
    return {"model_uri": uri, "model_id": model_id, "run_id": arm.run.run_id, "adapter_step": steps}


def _give_up(
    context: Context, heart: Heartbeat, tokens: dict[int, str], arms: Sequence[_Arm], error: BaseException
) -> None:
    """End what the error has cut off: the queue first, since it is the truth."""
    interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
    text = str(error) if isinstance(error, RankwiseError) else f"{type(error).__name__}: {error}"
    outcome = outcome_of(error)
    for token in tokens.values():
        if heart.holds(token):
            context.queue.finish(token, outcome, error=None if interrupted else text)
            heart.release(token)
    for arm in arms:
        if interrupted:
            arm.run.end("KILLED", INTERRUPTED, timeout=LEASE_S / 6)
        else:
            arm.run.end("FAILED", text, timeout=LEASE_S / 6)
