"""The cache of quantized bases between processes: two writers at once, a writer that is killed, no network."""

import json
import os
import signal
import subprocess
import time

import pytest
from helpers import warm
from helpers.tiny import make_base

# Prints whether the base came from the cache, and a digest over its weights and logits.
LOAD = """
import hashlib, json, sys, warnings
warnings.simplefilter("error", FutureWarning)
from pathlib import Path
import torch
from rankwise.assets.base import ResolvedBase
from rankwise.experiment.schema import QuantizationSpec
from rankwise.modeling.base import load_base
from rankwise.modeling import quantized_cache
from rankwise.settings import Settings

torch.set_num_threads(1)
path, ready, slow = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "slow"
if slow:
    describe = quantized_cache._describe

    def wait_then_describe(*arguments, **keywords):
        # The weights are written, the entry is not yet whole.
        ready.touch()
        import time
        time.sleep(600 if sys.argv[4] == "for ever" else 2)
        describe(*arguments, **keywords)

    quantized_cache._describe = wait_then_describe
resolved = ResolvedBase(source="org/tiny", revision="a" * 40, path=path, pinned=True)
base = load_base(resolved, QuantizationSpec(), Settings.load(), device="cpu")
digest = hashlib.sha256()
for name, tensor in sorted(base.model.state_dict().items()):
    digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
with torch.no_grad():
    digest.update(base.model(input_ids=torch.arange(12)[None]).logits.numpy().tobytes())
print(json.dumps({"from_cache": base.from_cache, "digest": digest.hexdigest()}))
"""


@pytest.fixture
def start(tmp_path):
    base = make_base(tmp_path / "base")
    started = []

    def start(*, slow="", how=""):
        process = subprocess.Popen(
            [warm.python(), "-c", LOAD, str(base), str(tmp_path / "ready"), slow, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "RANKWISE_CACHE": str(tmp_path / "cache")},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def result(process):
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr.decode()
    assert stderr == b""
    return json.loads(stdout)


def wait_for(path):
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_at_once_make_one_entry_and_load_the_same_bits(start, tmp_path):
    writer = start(slow="slow", how="a while")
    wait_for(tmp_path / "ready")
    waiting = start()
    one, other = result(writer), result(waiting)
    assert (one["from_cache"], other["from_cache"]) == (False, True)
    assert one["digest"] == other["digest"]
    names = [path.name for path in (tmp_path / "cache" / "quantized").iterdir()]
    assert len(names) == 1
    assert len(names[0]) == 64


def test_a_writer_killed_half_way_leaves_nothing_that_is_taken(start, tmp_path):
    writer = start(slow="slow", how="for ever")
    wait_for(tmp_path / "ready")
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    entries = tmp_path / "cache" / "quantized"
    (left,) = entries.iterdir()
    assert left.name.startswith(".")
    assert any(path.name == "model.safetensors" for path in left.iterdir())
    assert result(start())["from_cache"] is False
    assert [path.name.startswith(".") for path in entries.iterdir()] == [False]
