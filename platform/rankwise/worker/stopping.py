"""The wish to stop: the first SIGINT or SIGTERM asks for a checkpoint, the second one ends the work at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stop:
    """What the signals have said so far."""

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        """Nothing was asked for yet; `on_first` is called at the first wish."""
        self._on_first = on_first
        self.since: float | None = None
        self.now = False
        self.followers: list[Stop] = []
        """Asked whenever this one is."""

    @property
    def asked(self) -> bool:
        """Whether the work is to end."""
        return self.since is not None

    def ask(self) -> None:
        """Wish it once, or once more."""
        if self.since is None:
            self.since = time.monotonic()
            self._on_first()
        else:
            self.now = True
        for follower in self.followers:
            follower.ask()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM for wishes while the block runs. Only in a main thread."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.ask()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
