"""A program that runs a server and ends it with whoever started it: `python -m rankwise.tracking.tied COMMAND ...`.

Its standard input is a pipe that its starter holds: when that closes, however the starter has ended, the command and
all that it has started are ended. Nothing but the standard library is imported.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

STOP_S = 10.0
"""Seconds between the request to stop and the end by force."""
_LOOK_S = 0.2


def hold(command: Sequence[str], tied: int) -> int:
    """Run a command until it ends, the pipe `tied` closes or a SIGTERM comes.

    Returns:
        Its exit status; 0 when it was stopped.
    """
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    # A group of its own: MLflow's command starts the server proper as another process, and may end before it.
    process = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while process.poll() is None and not asked:
            readable, _, _ = select.select([tied], [], [], _LOOK_S)
            asked = asked or bool(readable and os.read(tied, 4096) == b"")
        if not asked:
            return process.returncode
        _signal(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while _alive(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        return 0
    finally:
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the group is left; the leader is no zombie once it was polled."""
    return process.poll() is None or _signal(process.pid, 0)


def _signal(group: int, number: int) -> bool:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    sys.exit(hold(sys.argv[1:], sys.stdin.fileno()))
