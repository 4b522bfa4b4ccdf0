"""What the queue holds, as plain values.

A *job* is one piece of work, named by its kind and spec hash. An *attempt* is one execution of it by one worker, with
its own fencing token: whoever holds the current token of a job may speak for it, nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


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
    """Asked to stop; the job goes back to the queue and no failure is counted."""
    CANCELLED = "cancelled"
    LOST = "lost"
    """The lease ran out, or the worker's process is gone."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job to be submitted."""

    kind: JobKind
    experiment: str
    spec_hash: str
    spec: dict[str, Any]
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
    mlflow_run_id: str | None = None
    result: dict[str, Any] | None = None
    error: str | None = None
    created_at: float = 0.0
    updated_at: float = 0.0

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
class Worker:
    """Who claims: a name, and where its process is, so that a dead one on the same host can be told."""

    name: str
    host: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Beat:
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
        return float(min(self.longest_backoff, self.backoff * 2 ** (failures - 1)))
