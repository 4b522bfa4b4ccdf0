"""How records of an outbox become requests to MLflow, in their order, as few as the limits allow."""

from __future__ import annotations

import json
import posixpath
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from rankwise.tracking.datasets import DatasetRecord
from rankwise.tracking.errors import UndeliverableError
from rankwise.tracking.outbox import Entry, line_of

# Limits of one log_batch request: 1,000 metrics, 100 params, 100 tags, 1 MB. Half of the bytes leaves room for the
# longer form that a record takes in the request.
MAX_METRICS = 1000
MAX_ITEMS = 100
MAX_BYTES = 400_000
_LOGGED_ARTIFACTS = "mlflow.loggedArtifacts"
_BATCHED = ("m", "params", "tags")
_KINDS = frozenset({*_BATCHED, "input", "file", "status", "end"})


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Entries that go out in one request. `kind` is the first key of their records, `?` for lines without a meaning."""

    kind: str
    entries: tuple[Entry, ...]

    @property
    def end(self) -> int:
        """The offset behind the last entry."""
        return self.entries[-1].end


def batches(entries: Sequence[Entry]) -> Iterator[Batch]:
    """Join neighbours of one kind up to the limits; the order stays."""
    kind, held, count, size = "", list[Entry](), 0, 0
    for entry in entries:
        this = _kind(entry.record)
        amount = len(entry.record[this]) if entry.record is not None and this in _BATCHED else 1
        limit = {"m": MAX_METRICS, "params": MAX_ITEMS, "tags": MAX_ITEMS, "?": MAX_ITEMS}.get(this, 1)
        if held and (this != kind or count + amount > limit or size + len(entry.line) > MAX_BYTES):
            yield Batch(kind=kind, entries=tuple(held))
            held, count, size = [], 0, 0
        kind = this
        held.append(entry)
        count += amount
        size += len(entry.line)
    if held:
        yield Batch(kind=kind, entries=tuple(held))


def halves(batch: Batch) -> tuple[Batch, Batch] | None:
    """A batch in two parts: of its entries or, of a single one, of its items. None where it has but one item."""
    if len(batch.entries) > 1:
        middle = len(batch.entries) // 2
        return replace(batch, entries=batch.entries[:middle]), replace(batch, entries=batch.entries[middle:])
    (entry,) = batch.entries
    items = list(entry.record[batch.kind].items()) if entry.record is not None and batch.kind in _BATCHED else []
    if len(items) < 2:
        return None
    middle = len(items) // 2
    return _with(batch, entry, dict(items[:middle])), _with(batch, entry, dict(items[middle:]))


def _with(batch: Batch, entry: Entry, items: Mapping[str, Any]) -> Batch:
    assert entry.record is not None
    record = {**entry.record, batch.kind: items}
    return replace(batch, entries=(replace(entry, record=record, line=line_of(record)),))


def deliver(client: MlflowClient, run_id: str, files: Path, batch: Batch) -> None:
    """Send one batch. Sending it again changes nothing.

    Args:
        client: The client of the store.
        run_id: The run.
        files: Where the artifacts of the outbox lie.
        batch: What to send; not of kind `?`.

    Raises:
        UndeliverableError: A file of the outbox is gone.
        MlflowException: The server refuses, or cannot be reached.
        OSError: An artifact store that is a directory cannot be written.
    """
    records = [entry.record for entry in batch.entries if entry.record is not None]
    match batch.kind:
        case "m":
            client.log_batch(
                run_id,
                metrics=[
                    Metric(key, value, record["t"], record["s"])
                    for record in records
                    for key, value in record["m"].items()
                ],
            )
        case "params":
            client.log_batch(run_id, params=[Param(key, value) for key, value in _merged(records, "params")])
        case "tags":
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in _merged(records, "tags")])
        case "input":
            client.log_inputs(run_id, datasets=[DatasetRecord(**record["input"]).entity() for record in records])
        case "file":
            for record in records:
                _artifact(client, run_id, files / record["file"], record["to"], table=record["table"])
        case "status":
            client.update_run(run_id, status=records[-1]["status"])
        case "end":
            client.set_terminated(run_id, status=records[-1]["end"], end_time=records[-1]["t"])
        case unknown:
            raise AssertionError(f"outbox record of unknown kind {unknown!r}")


def _kind(record: Mapping[str, Any] | None) -> str:
    kind = next(iter(record), "?") if record is not None else "?"
    return kind if kind in _KINDS else "?"


def _merged(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, str]]:
    """Items of all records; of equal keys the last one counts (the server refuses two in one request)."""
    merged: dict[str, str] = {}
    for record in records:
        merged.update(record[key])
    return list(merged.items())


def _artifact(client: MlflowClient, run_id: str, source: Path, path: str, *, table: bool) -> None:
    if not source.exists():
        raise UndeliverableError(f"the file for the artifact {path} is gone from {source.parent}")
    directory, name = posixpath.split(path)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as scratch:
        # The client names the artifact after the file. A link spares the copy.
        link = Path(scratch) / name
        link.symlink_to(source.absolute())
        client.log_artifact(run_id, str(link), directory or None)
    if table:
        # What log_table would set, so that the UI shows it as a table. log_table itself appends to an artifact that is
        # there already: sending twice would double the rows.
        known = json.loads(client.get_run(run_id).data.tags.get(_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": path, "type": "table"}
        if entry not in known:
            client.set_tag(run_id, _LOGGED_ARTIFACTS, json.dumps([*known, entry]))
