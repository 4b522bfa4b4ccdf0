"""The thread that delivers outboxes. Training appends and goes on; an outage only makes files grow."""

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
from rankwise.tracking.errors import describe, is_final
from rankwise.tracking.outbox import Batch, Outbox, batches, deliver, halves

_logger = logging.getLogger(__name__)
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
# While somebody waits for a drain, a server that came back must be noticed within its time limit.
_LONGEST_PAUSE_DRAINING = 2.0
# How long `remove` waits for a request under way; MLflow's client retries a dead server for minutes.
_HANGING_SECONDS = 5.0
# A round of deliveries takes time from the training: 8 ms of CPU time for each run's request over SQLite, and 0.08 ms
# for each point. So it rests for so many times its own length, which gathers more points for a request.
_REST = 300
_MOST_INTERVALS = 6
# How many outboxes are delivered in the background; others stay in their files for `sync`.
_MOST_LEFT = 200

Deliver = Callable[[MlflowClient, str, Path, Batch], None]
Missing = Callable[[MlflowClient, Batch], Batch | None]
Fence = Callable[[], bool]


@dataclass(kw_only=True)
class _Post:
    """What the sender knows of one outbox.

    `missing` reduces a batch to what the run has not; `fence` says whether its writer may still speak for the run;
    `left` that its writer is gone, so that it is closed as soon as it is empty.
    """

    outbox: Outbox
    missing: Missing | None = None
    fence: Fence | None = None
    left: bool = False
    fenced: bool = False
    refusals: list[str] = field(default_factory=list)


def rest(interval: float, took: float) -> float:
    """Seconds until the next round, after one that took so many seconds of CPU time."""
    return min(max(interval, _REST * took), _MOST_INTERVALS * interval)


class Sender:
    """Sends what outboxes hold, in order, in batches, until it was accepted.

    One daemon thread for all outboxes of a process, started with the first one. `add`, `drain` and `close` may be
    called from any thread.
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
        """Make a sender.

        Args:
            client: Gives the client of the store; may raise a `TrackingError` as long as the store does not answer.
            interval: Seconds between two looks at the outboxes, so that points travel in batches; up to six times as
                many where a look takes long, so that deliveries stay below a third of a percent of a core.
            send: What sends one batch.
            unreachable: Says in a moment why the store does not answer, or None: a request of MLflow's client to a dead
                server is retried for minutes, in which nobody would notice that it came back.
            backoff: Delays while the store takes nothing; by default 1 to 30 seconds.
        """
        self._client = client
        self._interval = interval
        self._send = send
        self._unreachable = unreachable
        self._posts: dict[Outbox, _Post] = {}
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
    def left(self) -> list[Outbox]:
        """What is delivered in the background, since its writer has ended."""
        with self._changed:
            return [post.outbox for post in self._posts.values() if post.left]

    def add(
        self, outbox: Outbox, *, missing: Missing | None = None, fence: Fence | None = None, left: bool = False
    ) -> None:
        """Deliver this outbox from now on; outboxes of one run are delivered in the order of their adding.

        Args:
            outbox: The file.
            missing: Reduces a batch to what the run has not (`replay.Replay.missing`).
            fence: Asked before each request whether the writer may still speak for the run. Once it answers no,
                nothing of the outbox is delivered any more; the file stays for a later `sync`.
            left: Whether its writer is gone: nobody will call `remove`.
        """
        with self._changed:
            if self._closing:
                raise RuntimeError("the sender is closed")
            self._posts[outbox] = _Post(outbox=outbox, missing=missing, fence=fence, left=left)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="rankwise-sender", daemon=True)
                self._thread.start()

    def drain(self, outbox: Outbox, timeout: float) -> bool:
        """Wait until everything that is in the outbox now was delivered or refused.

        Returns:
            False after `timeout` seconds, and when the fence has fallen.
        """
        target = outbox.end
        deadline = time.monotonic() + timeout
        with self._changed:
            self._drains += 1
            self._changed.notify_all()
            try:
                while outbox.offset < target:
                    post = self._posts.get(outbox)
                    rest = deadline - time.monotonic()
                    if rest <= 0 or post is None or post.fenced:
                        return False
                    self._changed.wait(rest)
            finally:
                self._drains -= 1
        return True

    def remove(self, outbox: Outbox) -> list[str]:
        """Stop delivering an outbox, close it, and return why lines of it were refused."""
        with self._changed:
            # A batch on its way is let finish, for a while: its offset would be lost otherwise.
            self._changed.wait_for(lambda: self._busy is not outbox, timeout=_HANGING_SECONDS)
            busy = self._busy is outbox
            post = self._posts.pop(outbox, None)
        if post is None:  # One that was left, delivered meanwhile.
            return []
        if not busy:
            outbox.close()
        return post.refusals

    def let_go(self, outbox: Outbox) -> list[str]:
        """Its writer has ended: close the outbox, or deliver what is left of it in the background and close it then.

        Returns:
            Why lines of it were refused so far.
        """
        if len(left := self.left) >= _MOST_LEFT:
            # Thousands of runs are made faster than they are delivered, and each outbox is an open file.
            self.drain(left[0], 0.0 if self._outage else _HANGING_SECONDS)
            if len(self.left) >= _MOST_LEFT:
                return self.remove(outbox)
        with self._changed:
            post = self._posts.get(outbox)
            if post is not None and outbox.pending and not post.fenced and not self._closing:
                post.left = True
                return post.refusals
        return self.remove(outbox)

    def close(self, timeout: float) -> bool:
        """Deliver what can be delivered within `timeout` seconds and end the thread; False if something is left."""
        deadline = time.monotonic() + timeout
        with self._changed:
            waiting = list(self._posts)
            left = self.left
        delivered = True
        for outbox in waiting:
            # Somebody has waited for these already.
            patience = 0.0 if outbox in left and self._outage else deadline - time.monotonic()
            delivered &= self.drain(outbox, max(0.0, patience))
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for outbox in waiting:
            if outbox in self._posts:
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
                posts = list(self._posts.values())
            began = time.thread_time()
            if self._round([post for post in posts if post.outbox.pending]):
                self._backoff.reset()
            else:
                self._backoff.fail()
            self._rest = rest(self._interval, time.thread_time() - began)

    def _round(self, posts: list[_Post]) -> bool:
        """Deliver each outbox as far as it goes; False when the store did not take something."""
        if posts and (reason := self._unreachable()):
            self._report_outage(reason)
            return False
        blocked: set[str] = set()
        for post in posts:
            # What a run said later must not overtake what it said before.
            if post.outbox.run_id in blocked or post.fenced:
                continue
            try:
                if not self._empty(post):
                    blocked.add(post.outbox.run_id)
                elif post.left and (post.fenced or not post.outbox.pending):
                    self.remove(post.outbox)  # What is left in it behind a fence is for whoever speaks for the run now.
            except (RankwiseError, OSError) as error:
                # A disk that is full or away: nothing can be remembered until it is back. Or nobody can say who may
                # speak.
                self._report_outage(str(error))
                blocked.add(post.outbox.run_id)
        return not blocked

    def _empty(self, post: _Post) -> bool:
        """Deliver one outbox as far as it goes; False when the store cannot take it now."""
        outbox = post.outbox
        with self._changed:
            if outbox not in self._posts:
                return True
            self._busy = outbox
        try:
            for batch in batches(outbox.read()):
                if not self._may_speak(post):
                    return True
                if not self._deliver(post, batch):
                    return False
        finally:
            with self._changed:
                self._busy = None
                removed = outbox not in self._posts
                self._changed.notify_all()
            if removed:  # `remove` did not wait for this batch to its end.
                outbox.close()
        return True

    def _may_speak(self, post: _Post) -> bool:
        try:
            if post.fence is None or post.fence():
                return True
        except Exception as error:
            raise TrackingError(f"nobody can say who may write to run {post.outbox.run_id}: {error}") from error
        _logger.warning(
            "run %s: this attempt may not write any more, another one may have taken over; what it had to say waits "
            "in %s",
            post.outbox.run_id,
            post.outbox.path,
        )
        with self._changed:
            post.fenced = True
            self._changed.notify_all()
        return False

    def _deliver(self, post: _Post, batch: Batch) -> bool:
        outbox = post.outbox
        try:
            if batch.kind == "?":
                self._refuse(post, batch, f"{len(batch.entries)} damaged lines in {outbox.path}")
            else:
                client = self._client()
                wanted = batch if post.missing is None else post.missing(client, batch)
                if wanted is not None and (reason := self._refusal(client, outbox, wanted)) is not None:
                    for part, why in self._divided(client, outbox, wanted, reason):
                        self._refuse(post, part, why)
        except Exception as error:  # Artifact stores raise errors of their own libraries; nothing is lost by waiting.
            if not is_final(error):
                self._report_outage(describe(error))
                outbox.sync()
                return False
            self._refuse(post, batch, describe(error))
        else:
            self._report_recovery()
        outbox.commit(batch.end)
        with self._changed:
            self._changed.notify_all()
        return True

    def _refusal(self, client: MlflowClient, outbox: Outbox, batch: Batch) -> str | None:
        """Send a batch, and return why the store refuses it for good; None where it was taken."""
        try:
            self._send(client, outbox.run_id, outbox.files, batch)
        except Exception as error:
            if not is_final(error):
                raise
            return describe(error)
        return None

    def _divided(self, client: MlflowClient, outbox: Outbox, batch: Batch, reason: str) -> list[tuple[Batch, str]]:
        """Send what is taken of a batch that was refused, and return the rest: one bad value takes nothing along."""
        parts = halves(batch)
        reasons = [] if parts is None else [self._refusal(client, outbox, part) for part in parts]
        if parts is None or reasons == [reason, reason]:  # Not about a value: the run was deleted, say.
            return [(batch, reason)]
        divided = [(part, why) for part, why in zip(parts, reasons, strict=True) if why is not None]
        return [found for part, why in divided for found in self._divided(client, outbox, part, why)]

    def _refuse(self, post: _Post, batch: Batch, reason: str) -> None:
        post.outbox.refuse(list(batch.entries))
        post.refusals.append(reason)
        _logger.error(
            "run %s: MLflow refused a record, kept in %s: %s", post.outbox.run_id, post.outbox.refused, reason
        )

    def _report_outage(self, reason: str) -> None:
        if self._outage is None:
            _logger.warning("MLflow takes nothing at the moment, points wait in the outbox: %s", reason)
        self._outage = reason

    def _report_recovery(self) -> None:
        if self._outage is not None:
            _logger.warning("MLflow takes points again")
            self._outage = None
