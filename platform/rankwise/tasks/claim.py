"""A claimed arm with all that belongs to it, while its pack is worked on.

- The engine's records as points in MLflow, as movement of the progress bar, and as progress of the jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rankwise.data.preflight import MANY_ROWS
from rankwise.exceptions import JobError
from rankwise.experiment.arm import ArmSpec
from rankwise.files import format_size
from rankwise.jobs.job import Job
from rankwise.logs import bind, bound
from rankwise.modeling.base import LoadedBase
from rankwise.tasks.context import Work
from rankwise.tasks.promote import FILE, digests_of
from rankwise.tasks.rows import Rows
from rankwise.tasks.search import paused_at
from rankwise.tasks.session import Session, token_of
from rankwise.tracking.notes import arm_note
from rankwise.tracking.provenance import Provenance
from rankwise.tracking.registry import JOB
from rankwise.tracking.run import Run
from rankwise.training.arm import ArmOutcome, PackObserver, StepRecord

_TAKEN = "{} was taken over by another worker"


@dataclass(frozen=True, kw_only=True)
class ClaimedArm:
    """One claimed train job.

    Attributes:
        job: Its row, with the token.
        work: What the row says.
        rows: Its rows as tokens.
    """

    job: Job
    work: Work
    rows: Rows

    @property
    def spec_hash(self) -> str:
        """The arm."""
        return self.work.arm.spec_hash

    @cached_property
    def row_digests(self) -> bytes:
        """The content of the artifact `FILE`: which rows the arm trains on."""
        return digests_of(self.work.arm, self.rows.examples.train)

    def logged(self) -> AbstractContextManager[None]:
        """What is logged within the block is about this arm, and goes into its job's file only."""
        return bound(arm=self.work.arm.short)

    @property
    def done_steps(self) -> int:
        """Steps at which the arm has paused already."""
        return paused_at(self.job)


def open_run(session: Session, arm: ClaimedArm, base: LoadedBase, provenance: Provenance) -> Run:
    """The arm's run: the one that was scheduled or begun, or a new one.

    Raises:
        JobError: Another worker has taken over the job.
        TrackingError: There is no run yet, and the server does not answer.
    """
    job, work, context = arm.job, arm.work, session.context
    computed = session.computed_by(job)
    if computed is not None and computed.run is not None:
        run, computed.run = computed.run, None
        return run
    # Submitting notes the run after the job: a quick worker has claimed it in between.
    run_id = job.mlflow_run_id or context.queue.get(job.id).mlflow_run_id
    adopted = _adopt(session, arm) if run_id is None and job.attempts > 1 else None
    run_id = run_id or adopted
    if run_id is not None:
        run = context.store.resume_run(run_id, attempt=job.attempts, fence=session.fence(job))
        if adopted is not None:
            run.params(work.arm.params)  # They may have been lost with the process that made it.
    else:
        noted, may_speak = False, session.fence(job)
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
            # Nobody else knows of it before it is noted.
            fence=lambda: not noted or may_speak(),
        )
        try:
            noted = context.queue.set_run(token_of(job), created.run_id)
        except BaseException:
            created.leave(timeout=0.0)
            raise
        if not noted:
            if context.queue.get(job.id).mlflow_run_id == created.run_id:
                created.leave(timeout=0.0)  # It has been found, and is gone on with.
            else:
                created.end("KILLED", "another worker has taken over this arm")
            raise JobError(_TAKEN.format(job.title))
        run = created
    # An earlier attempt may have ended before this, or have given the arm to another worker without opening its run.
    if not arm.done_steps:
        for record in arm.rows.inputs:
            run.input(record)
        run.text(work.definition, "experiment.yaml")
        run.json(provenance.to_dict(), "provenance.json")
        if (rows := len(arm.rows.examples.train)) > MANY_ROWS:
            size = format_size(len(arm.row_digests), ",.0f", unit="MB")
            session.voice.say(f"the digests of {rows:,} training rows take {size} in MLflow")
        run.data(arm.row_digests, FILE)
    run.tags(
        {
            **provenance.tags(),
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


def _adopt(session: Session, arm: ClaimedArm) -> str | None:
    """The run that an earlier attempt made and was killed before it noted it; noted now.

    Raises:
        JobError: Another worker has taken over the job.
        TrackingError: The server does not answer.
    """
    job, context = arm.job, session.context
    run_id = context.store.find_running(arm.work.experiment_id, job.id, "train")
    if run_id is not None and not context.queue.set_run(token_of(job), run_id):
        raise JobError(_TAKEN.format(job.title))
    return run_id


Tell = Callable[[str, Mapping[str, Any], bool], None]
"""Given a spec hash, how far its arm is, and whether that must not be left out."""


class Curves(PackObserver):
    """Writes each arm's curves to its run."""

    def __init__(
        self,
        arms: Mapping[str, tuple[Run, ArmSpec]],
        advance: Callable[[int], None],
        note: Callable[[str], None],
        tell: Tell = lambda spec_hash, values, always: None,
        ended: Callable[[ArmOutcome], None] = lambda outcome: None,
    ) -> None:
        """Write to the run of each arm, by spec hash; `tell` hears how far each arm is, `ended` how it ended."""
        self._arms = arms
        self._advance = advance
        self._note = note
        self._tell = tell
        self._ended = ended
        self._furthest = 0
        self._living: dict[str, int] = {}

    def on_start(self, spec_hash: str, step: int, total_steps: int) -> None:
        """An arm begins, perhaps in the middle."""
        self._living[spec_hash] = total_steps
        if step > self._furthest:
            self._advance(step - self._furthest)
            self._furthest = step
        self._tell(spec_hash, {"phase": "train", "step": step, "steps": total_steps}, True)

    def on_step(self, spec_hash: str, record: StepRecord) -> None:
        """An arm has made a step."""
        bind(step=record.step)
        run, arm = self._arms[spec_hash]
        if record.step > self._furthest:
            self._advance(record.step - self._furthest)
            self._furthest = record.step
        self._note(f"loss {record.loss:.3f}")
        speed = record.tokens / record.seconds if record.seconds > 0 else 0.0
        self._tell(
            spec_hash,
            {
                "phase": "train",
                "step": record.step,
                "steps": self._living.get(spec_hash),
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
        """An arm was evaluated during training."""
        self._arms[spec_hash][0].metrics(metrics, step)

    def on_checkpoint(self, step: int, directory: Path) -> None:
        """All living arms were saved."""
        for spec_hash in self._living:
            self._tell(spec_hash, {"checkpoint": step}, True)

    def on_end(self, outcome: ArmOutcome) -> None:
        """An arm left the pack."""
        self._living.pop(outcome.spec_hash, None)
        self._ended(outcome)
