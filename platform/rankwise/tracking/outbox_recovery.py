"""Recover outboxes of processes that died or gave up, and skip what their runs already have.

`adopt_orphans` opens the outboxes of a store that no living process writes. `Replay` compares an outbox with its run.
The store is not read before the first delivery, so a run can resume while the store is unavailable. What is skipped:

| record | skipped if |
|---|---|
| a point, in an outbox with repeated steps (`once`) | the run has a point with that key and step |
| a tag, of an attempt before the last | the run has that tag |
| an artifact, of an attempt before the last | the run has an artifact with that path |
| the run's status, of an attempt before the last | always |

The run's tag `rankwise.attempt` holds the number of the last attempt.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from rankwise.exceptions import TrackingError
from rankwise.files import storage_errors
from rankwise.redact import redact
from rankwise.settings import Settings
from rankwise.tracking.outbox import Outbox, OutboxBatch, last_reason, note_reason
from rankwise.tracking.outbox_records import InvalidOutboxError
from rankwise.tracking.query import RunRecord, get_run
from rankwise.tracking.run import PREFIX

ATTEMPT = "rankwise.attempt"


class Replay:
    """Compares one outbox with its run. Not thread-safe."""

    def __init__(self, outbox: Outbox) -> None:
        self._run_id = outbox.run_id
        self._attempt = outbox.attempt
        self._once = outbox.once
        self._record: RunRecord | None = None
        self._steps: dict[str, frozenset[int]] = {}

    def missing(self, client: MlflowClient, batch: OutboxBatch) -> OutboxBatch | None:
        """Return the part of a batch that the run does not have; None if it has everything."""
        match batch.kind:
            case "m":
                return _reduced(batch, "m", lambda record: self._new_points(client, record)) if self._once else batch
            case "tags" if self._is_superseded(client):
                return _reduced(batch, "tags", lambda record: self._new_tags(client, record))
            case "file" if self._is_superseded(client):
                return None if self._has_artifact(client, batch) else batch
            case "status" | "end" if self._is_superseded(client):
                return None
            case _:
                return batch

    def newer_attempt_running(self, client: MlflowClient) -> bool:
        """Return whether a later attempt is writing to the run now; its points must come first."""
        return self._is_superseded(client) and self._run(client).status == "RUNNING"

    def _new_points(self, client: MlflowClient, record: Mapping[str, Any]) -> dict[str, float]:
        return {key: value for key, value in record["m"].items() if record["s"] not in self._known(client, key)}

    def _new_tags(self, client: MlflowClient, record: Mapping[str, Any]) -> dict[str, str]:
        return {key: value for key, value in record["tags"].items() if key not in self._run(client).tags}

    def _known(self, client: MlflowClient, key: str) -> frozenset[int]:
        """Return the steps of the points that the run had before this outbox's first point was sent."""
        if key.startswith(PREFIX):  # Two samples of the machine are never the same.
            return frozenset()
        if key not in self._steps:
            history = client.get_metric_history(self._run_id, key)
            self._steps[key] = frozenset(metric.step for metric in history)
        return self._steps[key]

    def _is_superseded(self, client: MlflowClient) -> bool:
        return self._attempt is not None and last_attempt(self._run(client)) > self._attempt

    def _run(self, client: MlflowClient) -> RunRecord:
        if self._record is None:
            self._record = get_run(client, self._run_id)
        return self._record

    def _has_artifact(self, client: MlflowClient, batch: OutboxBatch) -> bool:
        (entry,) = batch.entries
        assert entry.record is not None
        path = entry.record["to"]
        return any(info.path == path for info in client.list_artifacts(self._run_id, posixpath.dirname(path) or None))


def last_attempt(run: RunRecord) -> int:
    """Return the number of the last attempt that the run's tags name; 0 if none."""
    text = run.tags.get(ATTEMPT, "")
    return int(text) if text.isdecimal() else 0


def _reduced(batch: OutboxBatch, key: str, keep: Callable[[Mapping[str, Any]], dict[str, Any]]) -> OutboxBatch | None:
    entries = []
    for entry in batch.entries:
        assert entry.record is not None
        if kept := keep(entry.record):
            entries.append(replace(entry, record={**entry.record, key: kept}))
    return replace(batch, entries=tuple(entries)) if entries else None


@dataclass(frozen=True, kw_only=True)
class OrphanedOutboxes:
    """Outboxes without a living writer, oldest first, and one line for each that was passed over."""

    outboxes: tuple[Outbox, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """The result of `Store.sync`: run ids of delivered outboxes, pending run ids with the reason, other problems."""

    delivered: tuple[str, ...]
    waiting: Mapping[str, str]
    problems: tuple[str, ...]


def adopt_orphans(settings: Settings, run_id: str | None = None) -> OrphanedOutboxes:
    """Open the outboxes without a living writer, optionally of one run; each stays locked until it is closed."""
    outboxes: list[Outbox] = []
    problems: list[str] = []
    for path in sorted(settings.outbox.glob(f"{run_id or '*'}.*.jsonl"), key=lambda path: (_age(path), path.name)):
        try:
            outbox = Outbox.adopt(path)
        except InvalidOutboxError as error:
            problems.append(_quarantine(path, str(error)))
            continue
        except TrackingError as error:
            problems.append(str(error))
            continue
        if outbox is None:
            continue
        if outbox.tracking_uri != redact(settings.tracking_uri):
            problems.append(
                f"{path} is for the store {outbox.tracking_uri}; to deliver it, set MLFLOW_TRACKING_URI to that store "
                "and run `rankwise sync`"
            )
            outbox.close()
            continue
        outboxes.append(outbox)
    return OrphanedOutboxes(outboxes=tuple(outboxes), problems=tuple(problems))


def _quarantine(path: Path, problem: str) -> str:
    """Rename a file that is not an outbox, so that it is reported but not tried again."""
    target = path.with_suffix(".invalid")
    number = 1
    while target.exists():
        number += 1
        target = path.with_suffix(f".{number}.invalid")
    with storage_errors(target, "moving an invalid outbox"):
        try:
            path.rename(target)
        except FileNotFoundError:  # Another `sync` has just done it.
            return problem
        note_reason(target.with_suffix(".reason"), problem)
    return f"{problem}; it is now {target.name}"


def _age(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # Its writer has just delivered it, or it cannot be opened either.
        return 0


def refused_records(settings: Settings) -> tuple[str, ...]:
    """Describe each file of refused records, and each file that is not an outbox, one line each."""
    lines = []
    for path in sorted(settings.outbox.glob("*.refused")):
        reason = last_reason(path.with_suffix(".reason"))
        why = f" ({reason})" if reason else ""
        lines.append(f"{path} has {_lines(path)} records that were refused permanently{why}; {_remove(path)}")
    for path in sorted(settings.outbox.glob("*.invalid")):
        reason = last_reason(path.with_suffix(".reason"))
        lines.append(f"{reason or f'{path} is not an outbox file'}; it was moved to {path}; {_remove(path)}")
    return tuple(lines)


def _remove(path: Path) -> str:
    beside = [other.name for other in (path.with_suffix(".reason"), path.with_suffix(".files")) if other.exists()]
    return "inspect it, then remove it" + (f" with {' and '.join(beside)}" if beside else "")


def _lines(path: Path) -> str:
    try:
        with path.open("rb") as file:
            count = sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return f"{count:,}"
