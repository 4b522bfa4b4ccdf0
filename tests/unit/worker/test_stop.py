"""Signals as wishes to stop, in a process of its own on a terminal of its own."""

import os
import pty
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

PROGRAM = """
import fcntl, signal, sys, termios, time
from rich.console import Console
from rankwise.cli.output import Bars
from rankwise.worker.heartbeat import Stop

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# Whoever runs the tests may have it ignored, which is inherited.
signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
console = Console(stderr=True)
stop = Stop(lambda: console.print("stopping after this step"))
with stop.on_signals(), Bars(console) as bars, bars.task("training", None) as advance:
    bars.say("ready")
    while not stop.requested:
        advance(1)
        time.sleep(0.02)
    for step in range(20):
        bars.say("writing a checkpoint")
        time.sleep(0.02)
with open(sys.argv[1], "w") as file:
    file.write(f"kept, {'at once' if stop.immediate else 'in peace'}")
"""


def on_terminal(directory, *arguments):
    """Start the program; the process, and the other end of its terminal once it is at work."""
    terminal, own = pty.openpty()
    command = [sys.executable, "-c", PROGRAM, str(directory / "kept"), *arguments]
    process = subprocess.Popen(command, stdin=own, stdout=own, stderr=own, start_new_session=True)
    os.close(own)
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    return process, terminal


def test_the_end_of_the_terminal_asks_for_a_checkpoint_as_often_as_it_is_told(tmp_path):
    process, terminal = on_terminal(tmp_path)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert (tmp_path / "kept").read_text() == "kept, in peace"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_work_at_once_and_the_end_of_a_terminal_under_nohup_nothing(tmp_path, number):
    process, terminal = on_terminal(tmp_path, "nohup")
    for each in (signal.SIGHUP, number, number):
        process.send_signal(each)
        assert os.read(terminal, 1000), "it goes on"
    with suppress(OSError):
        while os.read(terminal, 1000):
            pass
    assert process.wait(60) == 0
    os.close(terminal)
    assert (tmp_path / "kept").read_text() == "kept, at once"
