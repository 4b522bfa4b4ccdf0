"""Runs a command that ends with the process that started it: `python -m rankwise.supervise [--group] -- COMMAND`.

The starter holds the supervisor's standard input. When that pipe closes, for whatever reason, the supervisor stops the
command: SIGTERM, SIGTERM again after the grace, then SIGKILL to its process group. It forwards signals one by one. If
the supervisor is killed, the kernel sends the command a SIGTERM.

`--group` is for servers that start other processes and may end before them: signals go to the process group, a SIGTERM
stops it like a closed pipe, and no process of the group remains. Imports the standard library only: every worker has a
supervisor.
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
from contextlib import suppress
from types import FrameType
from typing import IO, Any

GRACE_S = 90.0
"""Seconds for a worker to write a checkpoint and return its jobs; longer than its own grace."""
SERVER_GRACE_S = 5.0
"""Seconds between the two SIGTERMs to a server; SIGKILL follows after as many again."""
_LAST_S = 10.0
_POLL_S = 0.2
_STOPPING_POLL_S = 0.05
_PR_SET_PDEATHSIG = 1


def start(
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    grace: float = GRACE_S,
    group: bool = False,
    output: int | IO[Any] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process, and return its supervisor.

    The supervisor's exit status is the command's (128 + N for signal N), or 0 for a group that was stopped. Closing its
    `stdin` ends both: `grace` is the time between the two SIGTERMs, SIGKILL follows after as many again, at most 10 s.
    `output` is for standard output and error, by default this process's.
    """
    # -P: a module in the working directory must not replace one of the standard library.
    supervisor = [sys.executable, "-P", "-m", "rankwise.supervise", "--grace", str(grace)]
    supervisor += [*(["--group"] if group else []), "--", *command]
    # A session of its own: Ctrl-C reaches only the starter, which forwards it once.
    return subprocess.Popen(
        supervisor,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT if output is not None else None,
        env=dict(environment),
        start_new_session=True,
    )


def run(command: Sequence[str], pipe: int, *, grace: float, group: bool = False) -> int:
    """Run a command until it ends, or the file descriptor `pipe` is closed; its exit status. See `start`."""
    requests = 0

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal requests
        requests += 1

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    # This process has one thread, so code may run between fork and exec.
    process = subprocess.Popen(
        list(command), stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_terminate_with_parent
    )
    delivered = 0
    stopping: float | None = None
    while process.poll() is None or (group and stopping is not None and _signal_group(process.pid, 0)):
        if stopping is None:
            readable, _, _ = select.select([pipe], [], [], _POLL_S)
            closed = bool(readable) and os.read(pipe, 4096) == b""
            if closed or (group and requests):
                stopping = time.monotonic()
                requests = max(requests, 1)
        else:
            time.sleep(_STOPPING_POLL_S)
            elapsed = time.monotonic() - stopping
            if elapsed > grace + min(grace, _LAST_S):
                break
            requests = max(requests, 1 + (elapsed > grace))
        for _ in range(requests - delivered):
            if group:
                _signal_group(process.pid, signal.SIGTERM)
            else:
                process.send_signal(signal.SIGTERM)
        delivered = requests
    if group or process.poll() is None:
        _signal_group(process.pid, signal.SIGKILL)
    code = process.wait()
    if group and requests:
        return 0
    return code if code >= 0 else 128 - code


def _terminate_with_parent() -> None:
    """SIGTERM when the supervisor dies; runs between fork and exec."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(group: int, number: int) -> bool:
    """False if the process group is empty."""
    with suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="rankwise.supervise")
    parser.add_argument("--grace", type=float, default=GRACE_S)
    parser.add_argument("--group", action="store_true")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    sys.exit(run(options.command, sys.stdin.fileno(), grace=options.grace, group=options.group))


if __name__ == "__main__":
    main()
