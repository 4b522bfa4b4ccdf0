from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from helpers.waiting import until

from rankwise import supervise

# Writes how often it was asked to stop, and ends at the given number.
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
# A leader that starts another process, and ends before it when it is asked to.
TREE = "sleep 60 & echo $!; wait"
# The same with a process that ignores SIGTERM.
STUBBORN_TREE = "sh -c 'trap \"\" TERM; sleep 60' & echo $!; wait"


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(times, grace=60.0, *, group=False):
        path = tmp_path / f"asked-{times}"
        command = [sys.executable, "-SEc", STUBBORN, str(path), str(times)]
        process = supervise.start(command, os.environ, grace=grace, group=group)
        started.append(process)
        until(path.exists)
        return process, path

    yield begin
    for process in started:
        process.stdin.close()
        process.kill()
        process.wait()


def start_group(script, grace=60.0):
    return supervise.start(["sh", "-c", script], os.environ, grace=grace, group=True, output=subprocess.PIPE)


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


@pytest.mark.parametrize("group", [False, True])
def test_a_command_that_does_not_stop_is_asked_again_and_killed(start, group):
    process, path = start(99, grace=0.3, group=group)
    (child,) = psutil.Process(process.pid).children()
    process.stdin.close()
    until(lambda: path.read_text() == "2")
    assert process.wait(20) == (0 if group else 128 + signal.SIGKILL)
    assert not child.is_running()


@pytest.mark.parametrize("group", [False, True])
def test_the_command_does_not_outlive_a_killed_supervisor(start, group):
    process, _ = start(1, group=group)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    until(lambda: not child.is_running())


@pytest.mark.parametrize("script", [TREE, STUBBORN_TREE], ids=["obedient", "stubborn"])
@pytest.mark.parametrize("how", ["the pipe closes", "SIGTERM"])
def test_everything_in_a_group_ends_with_its_starter(how, script):
    with start_group(script, grace=0.5) as process:
        sleeper = psutil.Process(int(process.stdout.readline()))
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            process.stdin.close()
        assert process.wait(30) == 0
    _, alive = psutil.wait_procs([sleeper], timeout=10)
    assert alive == []


def test_nothing_in_a_group_outlives_a_leader_that_ends_by_itself():
    with start_group("sleep 60 & echo $!; exit 3") as process:
        sleeper = psutil.Process(int(process.stdout.readline()))
        assert process.wait(30) == 3
    _, alive = psutil.wait_procs([sleeper], timeout=10)
    assert alive == []


@pytest.mark.parametrize(("script", "status"), [("exit 3", 3), ("kill -KILL $$", 128 + signal.SIGKILL)])
def test_the_exit_status_is_the_commands(script, status):
    with start_group(script) as process:
        assert process.wait(30) == status
