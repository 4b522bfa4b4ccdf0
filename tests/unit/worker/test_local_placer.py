"""The placer with small programs in slot of workers: what it starts, restarts, stops and leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest
from helpers.waiting import until

from rankwise.worker import local_placer
from rankwise.worker.heartbeat import Stop
from rankwise.worker.local_placer import LocalPlacer, RestartPolicy, listed_gpus, visible_gpus

# Notes its GPU and its process, and ends at the first SIGTERM.
STAYS = (
    "import os, signal, sys, time, pathlib\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    "gpu = os.environ['CUDA_VISIBLE_DEVICES']\n"
    "pathlib.Path(sys.argv[1], f'{gpu or None}-{os.getpid()}').touch()\n"
    "print('here', flush=True)\n"
    "time.sleep(60)\n"
)


@pytest.fixture
def said():
    return []


def placer(code, *arguments, gpus, said, stop=None, **options):
    return LocalPlacer(
        [sys.executable, "-SEc", code, *map(str, arguments)],
        gpus,
        environment=dict(os.environ),
        stop=stop or Stop(),
        say=said.append,
        restarts=RestartPolicy(max_crashes=3, first_delay=0.01),
        **options,
    )


def test_each_gpu_gets_a_worker_and_all_end_when_asked(tmp_path, said):
    stop = Stop()

    def ask():
        until(lambda: len(said) == 2)
        stop.request()

    thread = threading.Thread(target=ask)
    thread.start()
    assert placer(STAYS, tmp_path, gpus=["0", "GPU-b"], said=said, stop=stop).run() == 0
    thread.join()
    noted = sorted(path.name.rpartition("-") for path in tmp_path.iterdir())
    assert [name for name, _, _ in noted] == ["0", "GPU-b"]
    assert sorted(said) == ["[0] here", "[GPU-b] here"]
    assert not any(psutil.pid_exists(int(pid)) for _, _, pid in noted)


def test_a_machine_without_a_gpu_gets_one_worker(tmp_path, said):
    code = "import os, sys, pathlib; pathlib.Path(sys.argv[1], repr(os.environ['CUDA_VISIBLE_DEVICES'])).touch()"
    assert placer(code, tmp_path, gpus=[], said=said).run() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["''"]


def test_a_worker_that_crashes_is_started_again_and_given_up_in_the_end(tmp_path, said):
    code = (
        "import os, sys, signal, pathlib\n"
        "pathlib.Path(sys.argv[1], str(os.getpid())).touch()\n"
        "if os.environ['CUDA_VISIBLE_DEVICES'] == '0': os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    assert placer(code, tmp_path, gpus=["0", "1"], said=said).run() == 128 + signal.SIGSEGV
    assert len(list(tmp_path.iterdir())) == 3 + 1
    assert said[-1] == "[0] the worker ended with status 139 3 times and is not restarted"
    assert said[0] == "[0] the worker ended with status 139; restarting it in 0 s"


@pytest.mark.parametrize(("code", "drain", "starts"), [(1, True, 1), (2, False, 1), (130, False, 1), (1, False, 3)])
def test_only_a_crash_is_tried_again(tmp_path, said, code, drain, starts):
    program = f"import os, sys, pathlib; pathlib.Path(sys.argv[1], str(os.getpid())).touch(); sys.exit({code})"
    assert placer(program, tmp_path, gpus=["0"], said=said, drain=drain).run() == code
    assert len(list(tmp_path.iterdir())) == starts


# A placer in a process of its own, which a test can kill.
RUNS = (
    "import os, sys\n"
    "from rankwise.worker.local_placer import LocalPlacer\n"
    "from rankwise.worker.heartbeat import Stop\n"
    f"command = [sys.executable, '-SEc', {STAYS!r}, sys.argv[1]]\n"
    "LocalPlacer(command, ['0'], environment=dict(os.environ), stop=Stop(), say=print, grace=5).run()\n"
)


def test_workers_do_not_outlive_a_killed_placer(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", RUNS, str(tmp_path)], stdout=subprocess.DEVNULL)
    until(lambda: list(tmp_path.iterdir()))
    pid = int(next(tmp_path.iterdir()).name.partition("-")[2])
    process.kill()
    process.wait()
    until(lambda: not psutil.pid_exists(pid))


@pytest.mark.parametrize(
    ("said", "names"),
    [("0,1", ("0", "1")), (" GPU-a , GPU-b", ("GPU-a", "GPU-b")), ("", ()), ("-1", ()), ("0,-1,1", ("0",))],
)
def test_what_the_environment_says_counts(said, names):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": said}) == names


def test_the_list_of_the_driver_is_read_with_divided_gpus():
    text = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-a)
  MIG 3g.40gb     Device  1: (UUID: MIG-b)
"""
    assert listed_gpus(text) == ("GPU-1", "MIG-a", "MIG-b")
    assert listed_gpus("No devices found.\n") == ()


def test_a_machine_without_the_driver_has_none(monkeypatch):
    monkeypatch.setattr(local_placer.shutil, "which", lambda name: None)
    assert visible_gpus({}) == ()
