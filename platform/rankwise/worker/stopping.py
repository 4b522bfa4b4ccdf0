"""The wish to stop: the first SIGINT or SIGTERM asks for a checkpoint, the second one ends the work at once.

The end of the terminal (SIGHUP) asks for a checkpoint too, however often it is told.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_STANDARD = (0, 1, 2)


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
        """Take SIGINT, SIGTERM and SIGHUP (unless `nohup` has it ignored) for wishes while the block runs.

        Only in a main thread.
        """
        terminals = [descriptor for descriptor in _STANDARD if os.isatty(descriptor)]

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.ask()

        def on_hangup(number: int, frame: FrameType | None) -> None:
            # What is still said to a terminal that is gone would be an error, and end the work.
            nowhere = os.open(os.devnull, os.O_RDWR)
            for descriptor in terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
            # The shell and the kernel both tell.
            if not self.asked:
                self.ask()

        handlers = {signal.SIGINT: on_signal, signal.SIGTERM: on_signal}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            handlers[signal.SIGHUP] = on_hangup
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
