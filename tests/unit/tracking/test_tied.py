from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

# A leader that starts another process, and ends before it when it is asked to.
TREE = "sleep 60 & echo $!; wait"


def start(script):
    return subprocess.Popen(
        [sys.executable, "-m", "rankwise.tracking.tied", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("how", ["the pipe closes", "SIGTERM"])
def test_everything_ends_with_the_one_who_started_it(how):
    with start(TREE) as process:
        sleeper = psutil.Process(int(process.stdout.readline()))
        if how == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        else:
            process.stdin.close()
        assert process.wait(30) == 0
    _, alive = psutil.wait_procs([sleeper], timeout=10)
    assert alive == []


def test_a_command_that_ends_by_itself_tells_how():
    with start("exit 3") as process:
        assert process.wait(30) == 3
