"""Several processes, and some that die, at one cache."""

import os
import signal
import subprocess
import time

import pytest
from helpers import warm
from helpers.gguf_file import make_gguf

from rankwise.assets.base import resolve_base
from rankwise.settings import Settings

RESOLVE = """
import os, sys, torch
torch.set_num_threads(1)
from rankwise.assets import gguf_conversion
from rankwise.assets.base import resolve_base
from rankwise.settings import Settings

convert = gguf_conversion._convert
def announce(path, digest, folder, progress):
    print("converting", flush=True)
    convert(path, digest, folder, progress)
    if len(sys.argv) > 2:
        print(os.getpid(), flush=True)
        sys.stdin.read()
gguf_conversion._convert = announce
resolve_base(sys.argv[1], None, Settings.load())
"""


@pytest.fixture
def gguf(tmp_path):
    return make_gguf(tmp_path / "tiny.gguf")


def start(*arguments):
    command = [warm.python(), "-c", RESOLVE, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_convert_a_gguf_once(gguf):
    processes = [start(gguf) for _ in range(2)]
    said = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(said) == ["", "converting\n"]


def test_a_conversion_that_was_killed_before_it_was_whole_is_made_anew(gguf):
    settings = Settings.load()
    process = start(gguf, "wait")
    assert process.stdout.readline() == "converting\n"
    # Not whoever has asked for it: the end of its input would be there before its own.
    os.kill(int(process.stdout.readline()), signal.SIGKILL)
    process.communicate()
    (left,) = (settings.cache / "bases").iterdir()
    assert left.name.startswith(".")
    started = time.time()
    base = resolve_base(str(gguf), None, settings)
    assert [path.name for path in (settings.cache / "bases").iterdir()] == [base.path.name]
    assert (base.path / "model.safetensors").stat().st_mtime > started - 1
