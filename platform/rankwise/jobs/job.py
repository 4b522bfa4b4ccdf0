"""What the queue holds, as plain values.

A *job* is one piece of work, named by its kind and spec hash. An *attempt* is one execution of it by one worker, with
its own fencing token: whoever holds the current token of a job may speak for it, nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rankwise.backoff import delay_after


class JobKind(StrEnum):
    """What a job does."""

    TRAIN = "train"
    """Train one arm and register its adapter."""
    EVALUATE = "evaluate"
    """Evaluate one registered adapter, or the bare base, on one data set."""
    PREDICT = "predict"
    """Run one file through one or several adapters."""


class JobState(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    """Waits for a worker, for its time, or for the jobs that it comes after."""
    RUNNING = "running"
    """Held by a worker whose lease has not been taken away."""
    UPLOADING = "uploading"
    """Computed; what it made waits for the tracking server. Retried without computing again."""
    SUCCEEDED = "succeeded"
    """Done and published. A train job is here only when its adapter is registered."""
    FAILED = "failed"
    """Failed too often, or in a way that trying again cannot mend."""
    CANCELLED = "cancelled"
    """Stopped by a person, or pruned."""


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Counts as a failure of the job; tried again with backoff until the limit."""
    FATAL = "fatal"
    """Trying again cannot help (a user's error, a non-finite loss); the job fails at once."""
    PREEMPTED = "preempted"
    """Asked to stop; the job goes back to the queue, to be claimed again with its pack, and no failure is counted."""
    RETURNED = "returned"
    """Given back before it was started (it does not fit beside its mates): leaves the pack, and nothing is counted."""
    PAUSED = "paused"
    """At a rung: goes back to the queue, out of its pack, and is held there until `settle` says how it goes on."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """The lease ran out, or the worker's process is gone."""


def title(job_id: int, kind: str, spec_hash: str) -> str:
    """What messages call a job."""
    return f"job {job_id} ({kind} {spec_hash[:12]})"


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be submitted."""

    kind: JobKind
    experiment: str
    spec_hash: str
    spec: dict[str, Any]
    """What its worker needs, as JSON. The text of its `definition` is stored once, however many jobs have it."""
    pack_key: str | None = None
    priority: int = 0
    after: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as the database has it. Times are seconds since the epoch by the database's clock."""

    id: int
    kind: JobKind
    experiment: str
    spec_hash: str
    spec: dict[str, Any]
    state: JobState
    pack_key: str | None = None
    pack_id: str | None = None
    token: str | None = None
    priority: int = 0
    not_before: float = 0.0
    attempts: int = 0
    failures: int = 0
    preemptions: int = 0
    lost: int = 0
    cancel_requested: bool = False
    held: bool = False
    """Queued, and not to be claimed before `settle` or a person decides."""
    checkpoint: int = 0
    """The newest step that any attempt has reported as kept."""
    cancelled_by: int | None = None
    """The job whose bad end cancelled this one, which waited for it."""
    mlflow_run_id: str | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0

    @property
    def title(self) -> str:
        """What messages call the job: `job 7 (train 0123456789ab)`."""
        return title(self.id, self.kind, self.spec_hash)

    @property
    def ended(self) -> bool:
        """Whether nothing will happen to this job any more without a person."""
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        """One row of `rankwise jobs list --json`."""
        return {
            "id": self.id,
            "kind": str(self.kind),
            "state": str(self.state),
            "spec_hash": self.spec_hash,
            "attempts": self.attempts,
            "failures": self.failures,
            "preemptions": self.preemptions,
            "run_id": self.mlflow_run_id,
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One execution of a job by one worker. Times are seconds since the epoch by the database's clock."""

    token: str
    job_id: int
    number: int
    worker: str
    host: str
    pid: int
    started_at: float
    lease_until: float
    progress: dict[str, Any] | None = None
    progress_at: float | None = None
    ended_at: float | None = None
    outcome: Outcome | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """One attempt of `rankwise jobs show`. The token is a secret of its worker and stays out."""
        return {
            "number": self.number,
            "worker": self.worker,
            "host": self.host,
            "pid": self.pid,
            "started_at": self.started_at,
            "lease_until": self.lease_until,
            "progress": self.progress,
            "progress_at": self.progress_at,
            "ended_at": self.ended_at,
            "outcome": None if self.outcome is None else str(self.outcome),
            "error": self.error,
        }


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Who claims: a name, and where its process is, so that a dead one on the same host can be told."""

    name: str
    host: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """A worker that has announced itself."""

    name: str
    host: str
    pid: int
    started_at: float
    seen_at: float
    silent: float
    """Seconds since it was heard of last, by the database's clock."""
    info: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HeartbeatReply:
    """The answer to a heartbeat."""

    held: frozenset[str]
    """Tokens that still speak for their job. Publish nothing for the others."""
    cancelled: frozenset[str] = field(default=frozenset())
    """Held tokens whose job a person wants stopped."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How often a job is tried."""

    failures: int = 3
    lost: int = 10
    backoff: float = 10.0
    """Seconds before the second try; doubled with every failure."""
    longest_backoff: float = 600.0

    def wait_after(self, failures: int) -> float:
        """Seconds to wait after the given number of failures (1 or more)."""
        return delay_after(failures, first=self.backoff, longest=self.longest_backoff)
