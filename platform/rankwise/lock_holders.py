"""Which processes of this machine hold the locks of a file, and whether they are stopped.

A process that is stopped (SIGSTOP, Ctrl-Z, a debugger) keeps its locks: a SQLite database or a lock file stays locked
until it is resumed or ended. The kernel lists locks and their owners in `/proc/locks`. Reading that list opens none of
the files: closing a file drops all POSIX locks that this process has on it, those of SQLite too.

SQLite locks bytes of the database file; in WAL mode, writers lock bytes of the file `-shm` instead, and readers block
nobody (https://sqlite.org/walformat.html, https://sqlite.org/lockingv3.html).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.redact import redact

_LOCKS = Path("/proc/locks")
_STOPPED = frozenset("Tt")
_STATES = {"T": "stopped", "t": "stopped by a debugger", "D": "waiting for a disk", "Z": "ended"}
_LONGEST_COMMAND = 120


@dataclass(frozen=True, kw_only=True)
class LockHolder:
    """A process with a lock on a file.

    Attributes:
        started: Clock ticks from boot to the process's start. Together with `pid` it names one process of this boot.
        state: The kernel's letter, see proc_pid_stat(5).
    """

    pid: int
    started: int
    state: str
    command: str
    path: Path

    @property
    def stopped(self) -> bool:
        """Whether it does nothing until it is resumed."""
        return self.state in _STOPPED

    def kill(self) -> None:
        """End it with SIGKILL, unless it has ended and its number belongs to another process by now.

        Raises:
            PermissionError: It belongs to another user.
        """
        try:
            # From here on the number cannot be reused for this handle.
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if start_of(self.pid) == self.started:
                signal.pidfd_send_signal(process, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            os.close(process)

    def text(self) -> str:
        """The process in words, and what to do about it."""
        who = f"process {self.pid} ({self.command or 'unknown program'}; {_STATES.get(self.state, 'running')})"
        if self.stopped:
            return (
                f"{who} holds the lock of {self.path}: resume it with `kill -CONT {self.pid}`, or end it with "
                f"`kill -KILL {self.pid}`"
            )
        return f"{who} holds the lock of {self.path}; if it does not finish, end it with `kill {self.pid}`"


def lock_holders(path: Path) -> list[LockHolder]:
    """Other processes of this machine that hold a lock on a file, stopped ones first; empty where that is unknown."""
    return _holders(path, _owners(path, writing=False) - {os.getpid()})


def database_holders(database: Path) -> list[LockHolder]:
    """Other processes of this machine that keep this one from writing to a SQLite database, stopped ones first.

    Without WAL, a reader counts too: a transaction cannot be committed while another one reads.
    """
    shared = database.with_name(database.name + "-shm")
    owners = _owners(shared, writing=True) | _owners(database, writing=shared.exists())
    return _holders(database, owners - {os.getpid()})


def some_stopped() -> bool:
    """Whether any process with a lock, on whatever file, is stopped; cheap, and rarely true."""
    owners = {pid for pid, *_ in _locks()}
    return any((status := _status(pid)) is not None and status[0] in _STOPPED for pid in owners)


def describe_holders(holders: Sequence[LockHolder]) -> str:
    """The stopped holders in words, or all if none is stopped; empty without holders."""
    stopped = [holder for holder in holders if holder.stopped]
    return "; ".join(holder.text() for holder in stopped or holders)


def start_of(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None if there is no such process."""
    status = _status(pid)
    return None if status is None else status[2]


def parent_of(pid: int) -> int | None:
    """The process that started a process; None if there is no such process."""
    status = _status(pid)
    return None if status is None else status[1]


def _holders(path: Path, numbers: set[int]) -> list[LockHolder]:
    holders = []
    for pid in sorted(numbers):
        status = _status(pid)
        if status is not None:
            state, _, started = status
            holders.append(LockHolder(pid=pid, started=started, state=state, command=_command(pid), path=path))
    return sorted(holders, key=lambda holder: not holder.stopped)


def _locks() -> Iterator[tuple[int, bool, int, int]]:
    """All locks that are held: process, whether exclusive, device and inode."""
    try:
        lines = _LOCKS.read_text().splitlines()
    except OSError:  # Not Linux.
        return
    for line in lines:
        # 1: POSIX  ADVISORY  WRITE 27485 fe:00:2147470 1073741825 1073741825; a waiting one has `->` after the number.
        fields = line.split()
        if len(fields) < 8 or fields[1] == "->":
            continue
        major, minor, inode = fields[5].split(":")
        pid = int(fields[4])
        if pid > 0:  # Those of other PID namespaces are 0.
            yield pid, fields[3] == "WRITE", os.makedev(int(major, 16), int(minor, 16)), int(inode)


def _owners(path: Path, *, writing: bool) -> set[int]:
    """Processes with a lock on a file; with `writing` only exclusive ones."""
    try:
        stat = path.stat()
    except OSError:
        return set()
    return {
        pid
        for pid, exclusive, device, inode in _locks()
        if inode == stat.st_ino
        and (exclusive or not writing)
        # Btrfs and overlayfs show another device here than `stat` does.
        and (device == stat.st_dev or _has_open(pid, stat))
    }


def _has_open(pid: int, stat: os.stat_result) -> bool:
    try:
        descriptors = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return False
    for descriptor in descriptors:
        try:
            opened = descriptor.stat()
        except OSError:
            continue
        if (opened.st_dev, opened.st_ino) == (stat.st_dev, stat.st_ino):
            return True
    return False


def _status(pid: int) -> tuple[str, int, int] | None:
    """State, parent, and start in ticks since boot."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The program's name, in parentheses, may contain spaces and parentheses.
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[1]), int(fields[19])


def _command(pid: int) -> str:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    text = redact(" ".join(raw.replace(b"\0", b" ").decode(errors="replace").split()))
    return text if len(text) <= _LONGEST_COMMAND else text[:_LONGEST_COMMAND] + " ..."
