"""Run a program that ends with the process that started it: `python -m rankwise.worker.supervise -- CMD`.

It holds the other end of a pipe as its standard input. When that closes, however its starter has ended, the command is
asked to stop (SIGTERM), after the grace asked once more, and at last killed with all it has started. Signals are passed
on. When this program itself is killed, the kernel sends the command a SIGTERM. Nothing but the standard library is
imported: it is there once for each worker.

- A program that runs another one and lets it end with whoever started it: `python -m rankwise.worker.supervise -- CMD`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import IO, Any

GRACE_S = 90.0
"""Seconds for a worker to write a checkpoint and give its jobs back; more than its own grace."""
_LAST_S = 10.0
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    grace: float = GRACE_S,
    output: int | IO[Any] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process.

    Args:
        command: The program and its arguments.
        environment: Its environment.
        grace: Seconds between the request to stop and the next, stronger one.
        output: Where its standard output and error go; by default where this process's go.

    Returns:
        The tether. Its exit status is the command's; a SIGTERM to it is passed on; closing its `stdin` ends both.
    """
    tether = [sys.executable, "-m", "rankwise.worker.supervise", "--grace", str(grace), "--", *command]
    # A session of its own: Ctrl-C on a terminal goes to the starter alone, which passes it on once.
    return subprocess.Popen(
        tether,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        env=dict(environment),
        start_new_session=True,
    )


def _end_with_parent() -> None:
    """Run in the command's process before its program: a SIGTERM when this process dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def hold(command: Sequence[str], grace: float, tied: int) -> int:
    """Run a command until it ends or the pipe `tied` closes; its exit status, 128 and more for a signal."""
    asked = 0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    # One thread only, so that code may run between fork and exec.
    process = subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent
    )
    passed_on = 0
    closed: float | None = None
    while process.poll() is None:
        if closed is None:
            readable, _, _ = select.select([tied], [], [], _LOOK_S)
            if readable and os.read(tied, 4096) == b"":
                closed = time.monotonic()
                asked = max(asked, 1)
        else:
            time.sleep(_LOOK_S)
            asked = max(asked, 1 + (time.monotonic() > closed + grace))
        if closed is not None and time.monotonic() > closed + grace + min(grace, _LAST_S):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for _ in range(asked - passed_on):
            process.send_signal(signal.SIGTERM)
        passed_on = asked
    code = process.returncode
    return code if code >= 0 else 128 - code


def main() -> None:
    """The program."""
    parser = argparse.ArgumentParser(prog="rankwise.worker.supervise")
    parser.add_argument("--grace", type=float, default=GRACE_S)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    sys.exit(hold(options.command, options.grace, sys.stdin.fileno()))


if __name__ == "__main__":
    main()
