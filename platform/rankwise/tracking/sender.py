"""The sender thread, which delivers outboxes to MLflow in the background.

Training only appends to files. During an outage the files grow; nothing waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mlflow import MlflowClient

from rankwise.backoff import Backoff
from rankwise.exceptions import RankwiseError, TrackingError
from rankwise.tracking.connection import describe, is_final
from rankwise.tracking.outbox import Outbox, OutboxBatch, batches, deliver, halves

_logger = logging.getLogger(__name__)
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
# While `drain` waits, the sender must notice within its timeout that a server has recovered.
_LONGEST_PAUSE_DRAINING = 2.0
# How long `remove` waits for a request in flight; MLflow's client retries an unavailable server for minutes.
_REQUEST_GRACE_S = 5.0
# A round takes CPU time from the training (SQLite: 8 ms per request, 0.08 ms per point). So the sender then pauses for
# this many times the duration of the round, which also collects more points per request.
_REST = 300
_MOST_INTERVALS = 6
# More outboxes than this are not delivered in the background; they wait for `sync`.
_MAX_BACKGROUND = 200

Deliver = Callable[[MlflowClient, str, Path, OutboxBatch], None]
Missing = Callable[[MlflowClient, OutboxBatch], OutboxBatch | None]
Fence = Callable[[], bool]


@dataclass(kw_only=True)
class _Delivery:
    """The sender's state of one outbox, see `Sender.add`."""

    outbox: Outbox
    missing: Missing | None = None
    fence: Fence | None = None
    orphaned: bool = False
    fenced: bool = False
    refusals: list[str] = field(default_factory=list)


def rest(interval: float, took: float) -> float:
    """Return the seconds until the next round, given the CPU seconds of the last one."""
    return min(max(interval, _REST * took), _MOST_INTERVALS * interval)


class Sender:
    """Delivers outboxes in order and in batches, and retries until MLflow accepts or refuses a batch.

    One daemon thread per process serves all outboxes; it starts with the first one. `add`, `drain` and `close` are
    thread-safe.
    """

    def __init__(
        self,
        client: Callable[[], MlflowClient],
        *,
        interval: float = 10.0,
        send: Deliver = deliver,
        unreachable: Callable[[], str | None] = lambda: None,
        backoff: Backoff | None = None,
    ) -> None:
        """Create a sender.

        Args:
            client: Returns the client of the store; may raise `TrackingError` while the store is unreachable.
            interval: Seconds between rounds, so that points are sent in batches. Up to six times longer if a round
                takes long: deliveries use less than a third of a percent of a core.
            send: Sends one batch.
            unreachable: Returns quickly why the store does not answer, or None. MLflow's client would retry for
                minutes.
            backoff: Delays while the store is unavailable; by default 1 to 30 seconds.
        """
        self._client = client
        self._interval = interval
        self._send = send
        self._unreachable = unreachable
        self._deliveries: dict[Outbox, _Delivery] = {}
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._closing = False
        self._drains = 0
        self._backoff = backoff or Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        self._rest = interval
        self._busy: Outbox | None = None
        self._outage: str | None = None

    @property
    def outage(self) -> str | None:
        """Why the last delivery failed; None while deliveries succeed."""
        return self._outage

    @property
    def orphans(self) -> list[Outbox]:
        """Outboxes whose writer has ended and that are delivered in the background."""
        with self._changed:
            return [delivery.outbox for delivery in self._deliveries.values() if delivery.orphaned]

    def add(
        self, outbox: Outbox, *, missing: Missing | None = None, fence: Fence | None = None, orphaned: bool = False
    ) -> None:
        """Deliver this outbox from now on; outboxes of one run are delivered in the order in which they were added.

        Args:
            outbox: The file.
            missing: Reduces a batch to what the run does not have (`outbox_recovery.Replay.missing`).
            fence: Called before each request: may the writer still write to the run? After False, nothing more is
                delivered, and the file stays for a later `sync`.
            orphaned: Whether the writer has ended, so that the outbox is closed once it is empty.
        """
        with self._changed:
            if self._closing:
                raise RuntimeError("the sender is closed")
            self._deliveries[outbox] = _Delivery(outbox=outbox, missing=missing, fence=fence, orphaned=orphaned)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rankwise-sender", daemon=True)
                self._thread.start()

    def drain(self, outbox: Outbox, timeout: float) -> bool:
        """Wait until everything now in the outbox is delivered or refused; False on timeout or once fenced off."""
        target = outbox.end
        deadline = time.monotonic() + timeout
        with self._changed:
            self._drains += 1
            self._changed.notify_all()
            try:
                while outbox.offset < target:
                    delivery = self._deliveries.get(outbox)
                    rest = deadline - time.monotonic()
                    if rest <= 0 or delivery is None or delivery.fenced:
                        return False
                    self._changed.wait(rest)
            finally:
                self._drains -= 1
        return True

    def remove(self, outbox: Outbox) -> list[str]:
        """Stop delivering an outbox, close it, and return why records were refused."""
        with self._changed:
            # Give a batch in flight some time to finish, or its offset would be lost.
            self._changed.wait_for(lambda: self._busy is not outbox, timeout=_REQUEST_GRACE_S)
            busy = self._busy is outbox
            delivery = self._deliveries.pop(outbox, None)
        if delivery is None:  # An orphan that was delivered in the meantime.
            return []
        if not busy:
            outbox.close()
        return delivery.refusals

    def detach(self, outbox: Outbox) -> list[str]:
        """Close the outbox of a writer that has ended, after delivering the rest in the background.

        The result says why records were refused so far.
        """
        if len(orphans := self.orphans) >= _MAX_BACKGROUND:
            # Thousands of runs may be created faster than they are delivered, and each outbox is an open file.
            self.drain(orphans[0], 0.0 if self._outage else _REQUEST_GRACE_S)
            if len(self.orphans) >= _MAX_BACKGROUND:
                return self.remove(outbox)
        with self._changed:
            delivery = self._deliveries.get(outbox)
            if delivery is not None and outbox.pending and not delivery.fenced and not self._closing:
                delivery.orphaned = True
                return delivery.refusals
        return self.remove(outbox)

    def close(self, timeout: float) -> bool:
        """Deliver as much as possible within `timeout` seconds and stop the thread; False if something is left."""
        deadline = time.monotonic() + timeout
        with self._changed:
            pending = list(self._deliveries)
            orphans = self.orphans
        delivered = True
        for outbox in pending:
            # The end of an orphan's run has waited already.
            timeout_left = 0.0 if outbox in orphans and self._outage else deadline - time.monotonic()
            delivered &= self.drain(outbox, max(0.0, timeout_left))
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for outbox in pending:
            if outbox in self._deliveries:
                self.remove(outbox)
        return delivered

    def _work(self) -> None:
        while True:
            with self._changed:
                pause = self._backoff.delay or self._rest
                if self._drains:
                    pause = min(self._backoff.delay, _LONGEST_PAUSE_DRAINING)
                if not self._closing and pause:
                    before = self._drains
                    self._changed.wait_for(lambda: self._closing or self._drains > before, timeout=pause)  # noqa: B023
                if self._closing:
                    return
                deliveries = list(self._deliveries.values())
            began = time.thread_time()
            if self._round([delivery for delivery in deliveries if delivery.outbox.pending]):
                self._backoff.reset()
            else:
                self._backoff.fail()
            self._rest = rest(self._interval, time.thread_time() - began)

    def _round(self, deliveries: list[_Delivery]) -> bool:
        """Deliver all outboxes; False if the store could not accept something."""
        if deliveries and (reason := self._unreachable()):
            self._report_outage(reason)
            return False
        blocked: set[str] = set()
        for delivery in deliveries:
            # Later records of a run must not overtake earlier ones.
            if delivery.outbox.run_id in blocked or delivery.fenced:
                continue
            try:
                if not self._deliver_all(delivery):
                    blocked.add(delivery.outbox.run_id)
                elif delivery.orphaned and (delivery.fenced or not delivery.outbox.pending):
                    self.remove(delivery.outbox)  # The attempt that now owns the run delivers what a fence held back.
            except (RankwiseError, OSError) as error:
                # The disk is full or unavailable, so no offset can be stored; or the fence cannot be checked.
                self._report_outage(str(error))
                blocked.add(delivery.outbox.run_id)
            except Exception as error:
                # A bug. Without this thread, nothing would be delivered, and every `drain` would wait for its timeout.
                _logger.exception("run %s: its records cannot be delivered", delivery.outbox.run_id)
                delivery.refusals.append(f"its records cannot be delivered: {type(error).__name__}: {error}")
                with self._changed:
                    delivery.fenced = True
                    self._changed.notify_all()
        return not blocked

    def _deliver_all(self, delivery: _Delivery) -> bool:
        """Deliver one outbox; False if the store cannot accept it now."""
        outbox = delivery.outbox
        with self._changed:
            if outbox not in self._deliveries:
                return True
            self._busy = outbox
        try:
            for batch in batches(outbox.read()):
                if not self._may_write(delivery):
                    return True
                if not self._deliver(delivery, batch):
                    return False
        finally:
            with self._changed:
                self._busy = None
                removed = outbox not in self._deliveries
                self._changed.notify_all()
            if removed:  # `remove` timed out on this batch.
                outbox.close()
        return True

    def _may_write(self, delivery: _Delivery) -> bool:
        try:
            if delivery.fence is None or delivery.fence():
                return True
        except Exception as error:
            raise TrackingError(f"cannot check who may write to run {delivery.outbox.run_id}: {error}") from error
        _logger.warning(
            "run %s: this attempt may no longer write, another one may have taken over; its remaining records stay in "
            "%s",
            delivery.outbox.run_id,
            delivery.outbox.path,
        )
        with self._changed:
            delivery.fenced = True
            self._changed.notify_all()
        return False

    def _deliver(self, delivery: _Delivery, batch: OutboxBatch) -> bool:
        outbox = delivery.outbox
        try:
            if batch.kind == "?":
                first = batch.entries[0]
                lines = f"{len(batch.entries)} invalid lines in {outbox.path}, the first one before byte {first.end:,}"
                self._refuse(delivery, batch, f"{lines}: {first.problem}")
            else:
                client = self._client()
                needed = batch if delivery.missing is None else delivery.missing(client, batch)
                if needed is not None and (reason := self._refusal(client, outbox, needed)) is not None:
                    for part, why in self._send_in_parts(client, outbox, needed, reason):
                        self._refuse(delivery, part, why)
        except Exception as error:  # Artifact stores raise errors of their own libraries; retrying loses nothing.
            if not is_final(error):
                self._report_outage(describe(error))
                outbox.sync()
                return False
            self._refuse(delivery, batch, describe(error))
        else:
            self._report_recovery()
        outbox.commit(batch.end)
        with self._changed:
            self._changed.notify_all()
        return True

    def _refusal(self, client: MlflowClient, outbox: Outbox, batch: OutboxBatch) -> str | None:
        """Send a batch; return why the store refuses it permanently, or None."""
        try:
            self._send(client, outbox.run_id, outbox.files, batch)
        except Exception as error:
            if not is_final(error):
                raise
            return describe(error)
        return None

    def _send_in_parts(
        self, client: MlflowClient, outbox: Outbox, batch: OutboxBatch, reason: str
    ) -> list[tuple[OutboxBatch, str]]:
        """Send a refused batch in parts, so that one bad value affects no others; return the refused parts."""
        parts = halves(batch)
        reasons = [] if parts is None else [self._refusal(client, outbox, part) for part in parts]
        if parts is None or reasons == [reason, reason]:  # Not because of a value, e.g. the run was deleted.
            return [(batch, reason)]
        refused = [(part, why) for part, why in zip(parts, reasons, strict=True) if why is not None]
        return [final for part, why in refused for final in self._send_in_parts(client, outbox, part, why)]

    def _refuse(self, delivery: _Delivery, batch: OutboxBatch, reason: str) -> None:
        delivery.outbox.refuse(list(batch.entries), reason)
        delivery.refusals.append(reason)
        _logger.error(
            "run %s: a record was refused; it is kept in %s: %s",
            delivery.outbox.run_id,
            delivery.outbox.refused,
            reason,
        )

    def _report_outage(self, reason: str) -> None:
        if self._outage is None:
            _logger.warning("MLflow is unavailable; records are kept in the outbox until it recovers: %s", reason)
        self._outage = reason

    def _report_recovery(self) -> None:
        if self._outage is not None:
            _logger.warning("MLflow is available again")
            self._outage = None
