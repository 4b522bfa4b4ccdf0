"""What processes that died or gave up have left in the outbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.exceptions import TrackingError
from rankwise.redact import redact
from rankwise.settings import Settings
from rankwise.tracking.outbox import Outbox


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
