"""How the work under way goes on: packs with their progress, and when all will be done. No database, no clock."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.jobs.job import Attempt, Job, JobKind


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Jobs that one worker does together.

    Attributes:
        pack_id: Names the pack.
        kind: Of its jobs.
        experiment: Of its first job.
        worker: Who does it.
        jobs: Ids of its jobs.
        phase: What the worker does (load, tokenize, train, ...); None before the first report.
        step: Of the slowest job.
        steps: The last step of that job.
        tokens_per_second: Of all of them together.
        seconds: Since it was claimed.
        silent: Seconds since the last report of progress.
    """

    pack_id: str
    kind: JobKind
    experiment: str
    worker: str
    jobs: tuple[int, ...]
    phase: str | None
    step: int | None
    steps: int | None
    tokens_per_second: float | None
    seconds: float
    silent: float | None

    def to_json(self) -> dict[str, Any]:
        """One pack of `rankwise status --json`."""
        return {**asdict(self), "kind": str(self.kind), "jobs": list(self.jobs)}


def packs(jobs: Mapping[int, Job], attempts: Iterable[Attempt], time: float) -> list[Pack]:
    """Group the open attempts by pack.

    Args:
        jobs: The jobs of the attempts, by id.
        attempts: Those that have not ended.
        time: Now, by the database's clock.
    """
    groups: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        job = jobs.get(attempt.job_id)
        # One that was claimed after the jobs were read shows the next time.
        if job is not None and job.pack_id is not None:
            groups[job.pack_id, attempt.worker].append(attempt)
    return [_pack(pack_id, jobs, group, time) for (pack_id, _), group in groups.items()]


def _pack(pack_id: str, jobs: Mapping[int, Job], group: Sequence[Attempt], time: float) -> Pack:
    first = jobs[group[0].job_id]
    slowest = min(group, key=_done)
    said = slowest.progress or {}
    speeds = [speed for each in group if (speed := (each.progress or {}).get("tokens_per_second"))]
    reports = [attempt.progress_at for attempt in group if attempt.progress_at is not None]
    return Pack(
        pack_id=pack_id,
        kind=first.kind,
        experiment=first.experiment,
        worker=group[0].worker,
        jobs=tuple(attempt.job_id for attempt in group),
        phase=said.get("phase"),
        step=said.get("step"),
        steps=said.get("steps"),
        tokens_per_second=sum(speeds) if speeds else None,
        seconds=time - min(attempt.started_at for attempt in group),
        silent=time - max(reports) if reports else None,
    )


def _done(attempt: Attempt) -> float:
    """The part of an attempt that is done, from 0 to 1."""
    said = attempt.progress or {}
    step, steps = said.get("step"), said.get("steps")
    return min(1.0, step / steps) if step and steps else 0.0


def remaining_seconds(
    *, queued: int, running: Sequence[Attempt], recent: Sequence[Attempt], time: float
) -> float | None:
    """Seconds until all jobs of a kind are done, at the pace of late.

    The pace is what succeeded last over the time in which any of it was worked on, so that neither the pauses between
    two sweeps nor the number of workers and arms of a pack need to be known. Before anything has succeeded it is told
    from the steps of what runs.

    Args:
        queued: How many wait.
        running: The open attempts of this kind.
        recent: The attempts that succeeded last.
        time: Now, by the database's clock.

    Returns:
        None where nothing runs or nothing can be said yet; 0 where nothing is left.
    """
    left = queued + sum(1.0 - _done(attempt) for attempt in running)
    if queued == 0 and not running:
        return 0.0
    if not running:
        return None
    pace = len(recent) / busy if (busy := _busy_seconds(recent)) > 0 else _pace_of(running, time)
    return left / pace if pace > 0 else None


def _busy_seconds(attempts: Iterable[Attempt]) -> float:
    """The length of the union of the attempts' times."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted((each.started_at, each.ended_at) for each in attempts if each.ended_at is not None):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _pace_of(running: Iterable[Attempt], time: float) -> float:
    """Jobs a second that the steps of running attempts promise."""
    return sum(_done(each) / (time - each.started_at) for each in running if time > each.started_at)
