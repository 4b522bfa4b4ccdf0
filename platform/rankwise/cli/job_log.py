"""Reading a job's log: JSON lines that its worker appends."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

_POLL_S = 0.3


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, maxlen=lines)]


def follow(path: Path, lines: int | None, ended: Callable[[], bool]) -> Iterator[str]:
    """The lines of a log, and those that are appended until `ended`.

    Args:
        path: The log; one that is not there yet is waited for.
        lines: Begin with so many of the last lines; None for all.
        ended: Whether nothing more will come. Asked before the file is read to its end, so that no line is left out.
    """
    while not path.exists():
        if ended():
            return
        time.sleep(_POLL_S)
    with path.open(encoding="utf-8", errors="replace") as file:
        kept = deque(file, maxlen=lines)
        part = kept.pop() if kept and not kept[-1].endswith("\n") else ""
        yield from (line.rstrip("\n") for line in kept)
        while True:
            last = ended()
            for line in file:
                part += line
                if part.endswith("\n"):
                    yield part.rstrip("\n")
                    part = ""
            if last:
                break
            time.sleep(_POLL_S)
    if part:
        yield part
