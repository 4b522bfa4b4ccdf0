"""The MLflow run of a claimed train job: opened or resumed under the claim, then fed with the arm's curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rankwise.data.row_digests import MANY_ROWS
from rankwise.exceptions import JobError
from rankwise.experiment.arm import ArmSpec
from rankwise.files import format_size
from rankwise.jobs.job import Job
from rankwise.logs import bind, bound
from rankwise.modeling.base import LoadedBase
from rankwise.tasks.adaptive_sweep import paused_at
from rankwise.tasks.arm_rows import ArmRows
from rankwise.tasks.context import ArmWork
from rankwise.tasks.promote import ROW_DIGESTS_FILE, row_digests_of
from rankwise.tasks.session import Session, token_of
from rankwise.tracking.notes import arm_note
from rankwise.tracking.provenance import Provenance
from rankwise.tracking.registry import JOB
from rankwise.tracking.run import Run
from rankwise.training.arm import ArmOutcome, PackObserver, StepRecord

_TAKEN = "{} was taken over by another worker"


@dataclass(frozen=True, kw_only=True)
class ClaimedArm:
    """A claimed train job with its work and its rows as tokens."""

    job: Job
    work: ArmWork
    rows: ArmRows

    @property
    def spec_hash(self) -> str:
        """Spec hash of the arm."""
        return self.work.arm.spec_hash

    @cached_property
    def row_digests(self) -> bytes:
        """Content of the artifact `ROW_DIGESTS_FILE`: the rows that the arm trains on."""
        return row_digests_of(self.work.arm, self.rows.examples.train)

    def logged(self) -> AbstractContextManager[None]:
        """Mark log records within the block with this arm; they go only into its job's log."""
        return bound(arm=self.work.arm.short)

    @property
    def done_steps(self) -> int:
        """Step at which the arm paused; 0 before the first rung."""
        return paused_at(self.job)


def open_run(session: Session, arm: ClaimedArm, base: LoadedBase, provenance: Provenance) -> Run:
    """Resume the arm's run, or start one and record it in the queue.

    Raises:
        JobError: Another worker has taken over the job.
    """
    job, work, context = arm.job, arm.work, session.context
    computed = session.computed_by(job)
    if computed is not None and computed.run is not None:
        run, computed.run = computed.run, None
        return run
    # Submission records the run after the job: a fast worker may have claimed the job in between.
    run_id = job.mlflow_run_id or context.queue.get(job.id).mlflow_run_id
    adopted = _adopt(session, arm) if run_id is None and job.attempts > 1 else None
    run_id = run_id or adopted
    if run_id is not None:
        run = context.store.resume_run(run_id, attempt=job.attempts, fence=session.fence(job))
        if adopted is not None:
            run.params(work.arm.params)  # The process that created the run may have died before sending them.
    else:
        recorded, may_write = False, session.fence(job)
        created = context.store.start_run(
            work.experiment_id,
            work.run_name,
            parent=work.parent_run_id,
            params=work.arm.params,
            tags={**provenance.tags(), JOB: job.id},
            description=arm_note(work.arm),
            kind="train",
            spec_hash=work.arm.spec_hash,
            attempt=job.attempts,
            # No other worker knows the run before it is recorded.
            fence=lambda: not recorded or may_write(),
        )
        try:
            recorded = context.queue.set_run(token_of(job), created.run_id)
        except BaseException:
            created.leave(timeout=0.0)
            raise
        if not recorded:
            if context.queue.get(job.id).mlflow_run_id == created.run_id:
                created.leave(timeout=0.0)  # The new owner has adopted the run.
            else:
                created.end("KILLED", "another worker has taken over this arm")
            raise JobError(_TAKEN.format(job.title))
        run = created
    # Also in later attempts: an earlier one may have ended before this point.
    if not arm.done_steps:
        for record in arm.rows.inputs:
            run.input(record)
        run.text(work.definition, "experiment.yaml")
        run.json(provenance.to_dict(), "provenance.json")
        if (rows := len(arm.rows.examples.train)) > MANY_ROWS:
            size = format_size(len(arm.row_digests), ",.0f", unit="MB")
            session.reporter.say(f"the digests of {rows:,} training rows take {size} in MLflow")
        run.data(arm.row_digests, ROW_DIGESTS_FILE)
    run.tags(
        {
            **provenance.tags(),
            JOB: job.id,
            "rankwise.attempt": job.attempts,
            "rankwise.host": context.worker.host,
            "rankwise.device": str(base.device),
            "rankwise.compute_dtype": base.dtype_reason,
            "rankwise.attn_implementation": base.attention.reason,
            "rankwise.base_fingerprint": base.fingerprint.digest,
            "rankwise.reason": "",
        }
    )
    return run


def _adopt(session: Session, arm: ClaimedArm) -> str | None:
    """The run that an earlier attempt created but died before recording; it is recorded now."""
    job, context = arm.job, session.context
    run_id = context.store.find_running(arm.work.experiment_id, job.id, "train")
    if run_id is not None and not context.queue.set_run(token_of(job), run_id):
        raise JobError(_TAKEN.format(job.title))
    return run_id


ReportProgress = Callable[[str, Mapping[str, Any], bool], None]
"""Called with spec hash, progress values, and whether the report must not be throttled."""


class Curves(PackObserver):
    """Writes each arm's curves to its run, and its progress to the bar and to the queue."""

    def __init__(
        self,
        arms: Mapping[str, tuple[Run, ArmSpec]],
        advance: Callable[[int], None],
        show_note: Callable[[str], None],
        report_progress: ReportProgress = lambda spec_hash, values, always: None,
        on_arm_end: Callable[[ArmOutcome], None] = lambda outcome: None,
    ) -> None:
        """Take each arm's run by spec hash; `report_progress` and `on_arm_end` are called per arm."""
        self._arms = arms
        self._advance = advance
        self._show_note = show_note
        self._report_progress = report_progress
        self._on_arm_end = on_arm_end
        self._furthest = 0
        self._total_steps: dict[str, int] = {}

    def on_start(self, spec_hash: str, step: int, total_steps: int) -> None:
        """Report where the arm starts; a resumed arm starts after step 0."""
        self._total_steps[spec_hash] = total_steps
        if step > self._furthest:
            self._advance(step - self._furthest)
            self._furthest = step
        self._report_progress(spec_hash, {"phase": "train", "step": step, "steps": total_steps}, True)

    def on_step(self, spec_hash: str, record: StepRecord) -> None:
        """Report the step; log its metrics every `logging_steps` steps."""
        bind(step=record.step)
        run, arm = self._arms[spec_hash]
        if record.step > self._furthest:
            self._advance(record.step - self._furthest)
            self._furthest = record.step
        self._show_note(f"loss {record.loss:.3f}")
        speed = record.tokens / record.seconds if record.seconds > 0 else 0.0
        self._report_progress(
            spec_hash,
            {
                "phase": "train",
                "step": record.step,
                "steps": self._total_steps.get(spec_hash),
                "loss": record.loss if record.loss == record.loss else None,
                "tokens_per_second": round(speed, 1),
            },
            False,
        )
        if record.step % arm.training.logging_steps and record.step != 1:
            return
        run.metrics(
            {
                "train.loss": record.loss,
                "train.learning_rate": record.learning_rate,
                "train.grad_norm": record.grad_norm,
                "train.tokens_per_second": speed,
            },
            record.step,
        )

    def on_evaluation(self, spec_hash: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics of an evaluation during training."""
        self._arms[spec_hash][0].metrics(metrics, step)

    def on_checkpoint(self, step: int, directory: Path) -> None:
        """Report the checkpoint for every arm in the pack."""
        for spec_hash in self._total_steps:
            self._report_progress(spec_hash, {"checkpoint": step}, True)

    def on_end(self, outcome: ArmOutcome) -> None:
        """Drop an arm that left the pack."""
        self._total_steps.pop(outcome.spec_hash, None)
        self._on_arm_end(outcome)
