"""What of an outbox a run has already: an attempt that was interrupted may be followed by one that does steps again.

Nothing is read before the first delivery, so that a run can be gone on with while the store is away. What is compared:

| record | is left out where |
|---|---|
| a point, in an outbox whose steps may be done again | the run has one of that key and step |
| a tag, of an attempt that a later one has followed | the run has that tag |
| an artifact, of such an attempt | the run has one of that path |
| the run's state, of such an attempt | always |

Which attempt is the last one is what the tag `rankwise.attempt` of the run says.

- What processes that died or gave up have left in the outbox.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from rankwise.exceptions import TrackingError
from rankwise.redact import redact
from rankwise.settings import Settings
from rankwise.tracking.outbox import Batch, Outbox
from rankwise.tracking.query import RunRecord, get_run
from rankwise.tracking.run import PREFIX

ATTEMPT = "rankwise.attempt"


class Replay:
    """Compares one outbox with its run. Used by one thread at a time."""

    def __init__(self, outbox: Outbox) -> None:
        """Compare this outbox."""
        self._run_id = outbox.run_id
        self._attempt = outbox.attempt
        self._once = outbox.once
        self._record: RunRecord | None = None
        self._steps: dict[str, frozenset[int]] = {}

    def missing(self, client: MlflowClient, batch: Batch) -> Batch | None:
        """The part of a batch that the run has not; None when it has everything.

        Raises:
            TrackingError: The run cannot be read.
            MlflowException: Likewise.
        """
        match batch.kind:
            case "m":
                return _reduced(batch, "m", lambda record: self._new_points(client, record)) if self._once else batch
            case "tags" if self._followed(client):
                return _reduced(batch, "tags", lambda record: self._new_tags(client, record))
            case "file" if self._followed(client):
                return None if self._has_artifact(client, batch) else batch
            case "status" | "end" if self._followed(client):
                return None
            case _:
                return batch

    def overtaken(self, client: MlflowClient) -> bool:
        """Whether a later attempt is at work on the run now, whose points must come first.

        Raises:
            TrackingError: The run cannot be read.
        """
        return self._followed(client) and self._run(client).status == "RUNNING"

    def _new_points(self, client: MlflowClient, record: Mapping[str, Any]) -> dict[str, float]:
        return {key: value for key, value in record["m"].items() if record["s"] not in self._known(client, key)}

    def _new_tags(self, client: MlflowClient, record: Mapping[str, Any]) -> dict[str, str]:
        return {key: value for key, value in record["tags"].items() if key not in self._run(client).tags}

    def _known(self, client: MlflowClient, key: str) -> frozenset[int]:
        """The steps at which the run had a point of this curve when this outbox's first one came to be sent."""
        if key.startswith(PREFIX):  # Samples of the machine: no two are the same.
            return frozenset()
        if key not in self._steps:
            history = client.get_metric_history(self._run_id, key)
            self._steps[key] = frozenset(metric.step for metric in history)
        return self._steps[key]

    def _followed(self, client: MlflowClient) -> bool:
        return self._attempt is not None and last_attempt(self._run(client)) > self._attempt

    def _run(self, client: MlflowClient) -> RunRecord:
        if self._record is None:
            self._record = get_run(client, self._run_id)
        return self._record

    def _has_artifact(self, client: MlflowClient, batch: Batch) -> bool:
        (entry,) = batch.entries
        assert entry.record is not None
        path = entry.record["to"]
        return any(found.path == path for found in client.list_artifacts(self._run_id, posixpath.dirname(path) or None))


def last_attempt(run: RunRecord) -> int:
    """The number of the last attempt that has told the store of itself; 0 where none has."""
    text = run.tags.get(ATTEMPT, "")
    return int(text) if text.isdecimal() else 0


def _reduced(batch: Batch, key: str, keep: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Batch | None:
    entries = []
    for entry in batch.entries:
        assert entry.record is not None
        if kept := keep(entry.record):
            entries.append(replace(entry, record={**entry.record, key: kept}))
    return replace(batch, entries=tuple(entries)) if entries else None


@dataclass(frozen=True, kw_only=True)
class Left:
    """Outboxes without a living writer, oldest first, and why others were passed over, one line each."""

    outboxes: tuple[Outbox, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What `Store.sync` did with outboxes that earlier processes left.

    Attributes:
        delivered: Run ids of which an outbox was delivered.
        waiting: Run ids of which something still waits, and why.
        problems: Refused records and files that are not for this store, one line each.
    """

    delivered: tuple[str, ...]
    waiting: Mapping[str, str]
    problems: tuple[str, ...]


def find_left(settings: Settings, run_id: str | None = None) -> Left:
    """Take up outboxes that no living process writes; the lock on each is held until it is closed.

    Args:
        settings: Where they are, and which store is theirs.
        run_id: Only those of this run.
    """
    outboxes: list[Outbox] = []
    problems: list[str] = []
    for path in sorted(settings.outbox.glob(f"{run_id or '*'}.*.jsonl"), key=lambda path: (_age(path), path.name)):
        try:
            outbox = Outbox.adopt(path)
        except TrackingError as error:
            problems.append(str(error))
            continue
        if outbox is None:
            continue
        if outbox.tracking_uri != redact(settings.tracking_uri):
            problems.append(f"{path} is for the store {outbox.tracking_uri}: set MLFLOW_TRACKING_URI to it")
            outbox.close()
            continue
        outboxes.append(outbox)
    return Left(outboxes=tuple(outboxes), problems=tuple(problems))


def _age(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # Delivered by its writer in this moment.
        return 0


def refused_records(settings: Settings) -> tuple[str, ...]:
    """Files of records that MLflow has refused for good, one line each."""
    lines = []
    for path in sorted(settings.outbox.glob("*.refused")):
        count = path.read_bytes().count(b"\n")
        lines.append(f"{path} has {count} records that MLflow refused for good; remove it once you have looked at it")
    return tuple(lines)
