from __future__ import annotations

import os
import signal
import sys
import time

import psutil
import pytest
from helpers.waiting import until

from rankwise.worker import supervise as tether

# Writes what it is told, and ends when it was asked so often.
STUBBORN = (
    "import signal, sys, time, pathlib\n"
    "asked = 0\n"
    "def ask(*_):\n"
    "    global asked\n"
    "    asked += 1\n"
    "    pathlib.Path(sys.argv[1]).write_text(str(asked))\n"
    "    if asked == int(sys.argv[2]): sys.exit(7)\n"
    "signal.signal(signal.SIGTERM, ask)\n"
    "pathlib.Path(sys.argv[1]).write_text('0')\n"
    "while True: time.sleep(0.05)\n"
)


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(times, grace=60.0):
        path = tmp_path / f"asked-{times}"
        process = tether.start([sys.executable, "-SEc", STUBBORN, str(path), str(times)], os.environ, grace=grace)
        started.append(process)
        until(path.exists)
        return process, path

    yield begin
    for process in started:
        process.stdin.close()
        process.kill()
        process.wait()


def test_a_closed_pipe_asks_the_command_to_stop(start):
    process, path = start(1)
    process.stdin.close()
    assert process.wait(20) == 7
    assert path.read_text() == "1"


def test_signals_are_passed_on_one_by_one(start):
    process, path = start(2)
    process.terminate()
    until(lambda: path.read_text() == "1")
    time.sleep(0.4)
    assert path.read_text() == "1"
    process.terminate()
    assert process.wait(20) == 7


def test_a_command_that_does_not_stop_is_asked_again_and_killed(start, monkeypatch):
    process, path = start(99, grace=0.3)
    (child,) = psutil.Process(process.pid).children()
    process.stdin.close()
    until(lambda: path.read_text() == "2")
    assert process.wait(20) == 128 + signal.SIGKILL
    assert not child.is_running()


def test_the_command_does_not_outlive_a_killed_tether(start):
    process, _ = start(1)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    until(lambda: not child.is_running())
