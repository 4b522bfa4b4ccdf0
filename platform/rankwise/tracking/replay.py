"""What of an outbox a run has already: an attempt that was interrupted may be followed by one that does steps again.

Nothing is read before the first delivery, so that a run can be gone on with while the store is away. What is compared:

| record | is left out where |
|---|---|
| a point, in an outbox whose steps may be done again | the run has one of that key and step |
| a tag, of an attempt that a later one has followed | the run has that tag |
| an artifact, of such an attempt | the run has one of that path |
| the run's state, of such an attempt | always |

Which attempt is the last one is what the tag `rankwise.attempt` of the run says.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mlflow import MlflowClient

from rankwise.tracking.delivery import Batch
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.query import RunRecord, get_run
from rankwise.tracking.system_metrics import PREFIX

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
