"""The real process and its pipes, with a program in place of the one that trains."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from rankwise.worker.child import ChildDiedError, ChildProcess, explain_exit, log_tail

# Light: no library is imported.
PROGRAM = """
import faulthandler, json, os, signal, sys, time
events = os.fdopen(int(sys.argv[sys.argv.index("--events") + 1]), "wb", buffering=0)
faulthandler.register(signal.SIGUSR1, file=open(sys.argv[sys.argv.index("--stacks") + 1], "w"))
def say(**message): events.write(json.dumps(message).encode() + b"\\n")
say(event="hello", pid=os.getpid())
for line in sys.stdin:
    command = json.loads(line)["do"]
    if command == "die": os.kill(os.getpid(), signal.SIGSEGV)
    if command == "half": events.write(b'{"event": "do'); sys.stderr.write("last words"); sys.exit(3)
    if command == "fork":
        if os.fork() == 0: time.sleep(60); os._exit(0)
    if command == "hang":
        def in_the_data_loader(): time.sleep(100)
        in_the_data_loader()
    if command == "quit": break
    say(event="done", value={"echo": command, "session": os.getsid(0)})
"""


@pytest.fixture
def child(tmp_path):
    made = ChildProcess([sys.executable, "-c", PROGRAM], tmp_path / "logs", os.environ)
    yield made
    made.kill()


def answer(child):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        message = child.receive(0.1)
        if message is not None and message["event"] != "hello":
            return message
    raise AssertionError("the child says nothing")


def test_commands_go_down_and_events_come_up(child):
    child.send({"do": "one"})
    assert answer(child)["value"]["echo"] == "one"
    child.send({"do": "two"})
    value = answer(child)["value"]
    assert value == {"echo": "two", "session": child.pid}, "in a session of its own: Ctrl-C does not reach it"
    child.close()
    assert not child.log.exists(), "it had nothing to say"


def test_a_crash_is_told_with_its_signal(child):
    child.send({"do": "die"})
    with pytest.raises(ChildDiedError) as death:
        answer(child)
    assert death.value.code == -signal.SIGSEGV
    with pytest.raises(ChildDiedError):
        child.receive(0.1)


def test_a_line_that_death_cut_off_is_no_event_and_the_last_words_are_kept(child):
    child.send({"do": "half"})
    with pytest.raises(ChildDiedError) as death:
        answer(child)
    assert death.value.code == 3
    text = explain_exit(3, "train", child.log, killed_for_memory=False)
    assert text == (f"the worker process exited with status 3 during phase train; the end of {child.log}:\nlast words")


def test_the_stacks_of_a_hung_child_are_kept(child):
    child.send({"do": "hang"})
    while child.receive(0.1) is None:
        pass
    time.sleep(0.1)
    stacks = child.stacks()
    assert "in_the_data_loader" in stacks.read_text()
    child.kill()
    with pytest.raises(ChildDiedError) as death:
        child.receive(5)
    assert death.value.code == -signal.SIGKILL


@pytest.mark.parametrize("end", ["kill", "close", "die"])
def test_what_a_child_leaves_behind_ends_with_it(child, end):
    child.send({"do": "fork"})
    answer(child)
    (left,) = psutil.Process(child.pid).children()
    began = time.monotonic()
    if end == "die":
        child.send({"do": "die"})
        with pytest.raises(ChildDiedError):
            answer(child)
    else:
        getattr(child, end)()
    assert time.monotonic() - began < 15, "it holds the pipe for a minute"
    psutil.wait_procs([left], timeout=10)
    assert not left.is_running()


def test_a_child_that_hears_nothing_any_more_does_not_hold_up_its_parent(child):
    child.send({"do": "hang"})
    beat = {"do": "beat", "until": {f"{number:032x}": 1.0 for number in range(16)}}
    told = threading.Thread(target=lambda: [child.send(beat) for _ in range(200)], daemon=True)
    told.start()
    told.join(10)
    assert not told.is_alive(), "a pipe holds 64 KiB: some minutes of heartbeats"
    child.kill()
    with pytest.raises(ChildDiedError):
        answer(child)


def test_a_program_that_cannot_be_started_leaves_nothing_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        ChildProcess([str(tmp_path / "none")], tmp_path / "logs", os.environ)
    assert os.listdir("/proc/self/fd") == before


def test_a_child_ends_with_the_pipe_of_a_parent_that_was_killed(tmp_path):
    parent = f"""
import os, sys, time
from pathlib import Path
from rankwise.worker.child import ChildProcess
child = ChildProcess([sys.executable, "-c", {PROGRAM!r}], Path({str(tmp_path)!r}), os.environ)
while child.receive(0.1) is None: pass
print(child.pid, flush=True)
time.sleep(100)
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    assert psutil.pid_exists(pid)
    process.kill()
    process.communicate()
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("code", "killed_for_memory", "said"),
    [
        (
            -9,
            True,
            "out of memory: the kernel killed the worker process during phase train; lower training.per_dev",
        ),
        (
            -9,
            False,
            "was killed (SIGKILL) during phase train; unless someone killed it, it ran out of memory: lower training.",
        ),
        (-7, False, "crashed (SIGBUS) during phase train; "),
        (1, False, "exited with status 1 during phase train"),
    ],
)
def test_a_death_is_explained_with_what_can_be_done(tmp_path, code, killed_for_memory, said):
    assert said in explain_exit(code, "train", tmp_path / "none", killed_for_memory=killed_for_memory)


def test_only_the_end_of_a_long_log_is_kept(tmp_path):
    (tmp_path / "log").write_text("first\n" * 1000 + "last\n")
    assert log_tail(tmp_path / "log", 20).endswith("last")
    assert len(log_tail(tmp_path / "log", 20)) <= 20
