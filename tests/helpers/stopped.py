"""Processes that hold a lock and are stopped (SIGSTOP), as a debugger or a batch system leaves them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from helpers.waiting import until

WRITER = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("CREATE TABLE IF NOT EXISTS t (x)")
connection.execute("BEGIN IMMEDIATE")
print("holds", flush=True)
"""
READER = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
connection.execute("SELECT * FROM sqlite_master").fetchall()
print("holds", flush=True)
"""
LOCKER = """
import fcntl, os, signal, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("holds", flush=True)
"""
_STOP = "os.kill(os.getpid(), signal.SIGSTOP)\n"
_WAIT = "sys.stdin.read()\n"


@contextmanager
def holding(script: str, path: Path, *, stopped: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A process that runs the script and then holds its lock, stopped or waiting; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", script + (_STOP if stopped else "") + _WAIT, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        if stopped:
            until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, what="the stop")
        yield process
    finally:
        process.kill()
        process.communicate()
