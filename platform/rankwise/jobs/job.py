"""Jobs, attempts and workers as plain values, and their states.

A *job* is one piece of work, identified by kind and spec hash. An *attempt* is one execution of it by one worker, with
its own fencing token: only the holder of a job's current token may change the job.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rankwise.backoff import delay_after

MAX_ARMS = 16
"""Default of the most arms that a worker claims together; memory decides how many of them start."""


class JobKind(StrEnum):
    """What a job does."""

    TRAIN = "train"
    """Train one arm and register its adapter."""
    EVALUATE = "evaluate"
    """Evaluate one registered adapter, or the base alone, on one dataset."""
    PREDICT = "predict"
    """Predict one file with one or several adapters."""


class JobState(StrEnum):
    """The state of a job."""

    QUEUED = "queued"
    """Waiting for a worker, for `not_before`, or for other jobs."""
    RUNNING = "running"
    """Held by a worker with a lease."""
    UPLOADING = "uploading"
    """Computed, publication pending. Retried without computing again."""
    SUCCEEDED = "succeeded"
    """Done and published; for a train job, only when its adapter is registered."""
    FAILED = "failed"
    """Failed too often, or with an error that a retry cannot fix."""
    CANCELLED = "cancelled"
    """Stopped by a user, or pruned."""


ENDED = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """A failure of the job; retried with backoff up to the limit."""
    FATAL = "fatal"
    """A retry cannot help (user error, non-finite loss); the job fails at once."""
    PREEMPTED = "preempted"
    """Interrupted; the job returns to the queue with its pack. Not a failure."""
    RETURNED = "returned"
    """Returned before it started, since it does not fit with its pack, which it leaves. Not a failure."""
    PAUSED = "paused"
    """At a rung: the job returns to the queue, leaves its pack, and is held until `settle`."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """The lease expired, or the worker's process is gone."""


def title(job_id: int, kind: str, spec_hash: str) -> str:
    """The name of a job in messages: `job 7 (train 0123456789ab)`."""
    return f"job {job_id} ({kind} {spec_hash[:12]})"


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to submit."""

    kind: JobKind
    experiment: str
    spec_hash: str
    spec: dict[str, Any]
    """The payload for its worker. A text under `definition` is stored once for all jobs that share it."""
    pack_key: str | None = None
    priority: int = 0
    after: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job in the database. Times are seconds since the epoch by the database's clock."""

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
    """Queued, but not to be claimed before `settle` or a user decides."""
    checkpoint: int = 0
    """The latest step of which any attempt has reported a checkpoint."""
    cancelled_by: int | None = None
    """The failed or cancelled job that this one waited for."""
    mlflow_run_id: str | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0

    @property
    def title(self) -> str:
        """The job's name in messages."""
        return title(self.id, self.kind, self.spec_hash)

    @property
    def ended(self) -> bool:
        """Whether the job is in a final state."""
        return self.state in ENDED

    def to_json(self) -> dict[str, Any]:
        """The job in `rankwise jobs list --json`."""
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
        """The attempt in `rankwise jobs show`, without the token, which is secret."""
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
    """A worker that claims jobs; host and pid identify dead workers on the same host."""

    name: str
    host: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """An announced worker."""

    name: str
    host: str
    pid: int
    started_at: float
    seen_at: float
    silent: float
    """Seconds since its last announcement, by the database's clock."""
    info: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HeartbeatReply:
    """The answer to a heartbeat."""

    held: frozenset[str]
    """Tokens that are still valid. Publish nothing for the others."""
    cancelled: frozenset[str] = field(default=frozenset())
    """Held tokens of jobs that a user wants to cancel."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How often a job is retried."""

    failures: int = 3
    lost: int = 10
    backoff: float = 10.0
    """Seconds before the first retry; doubled with every failure."""
    longest_backoff: float = 600.0

    def wait_after(self, failures: int) -> float:
        """Seconds to wait after the given number of failures (1 or more)."""
        return delay_after(failures, first=self.backoff, longest=self.longest_backoff)
