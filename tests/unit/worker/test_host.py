"""Workers of two containers that share a name do not take each other for dead."""

import os
import shutil
import subprocess
import sys

import pytest

from rankwise.jobs.job import JobKind, NewJob
from rankwise.jobs.store import JobStore
from rankwise.worker.local_placer import host_name, this_worker

CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c"]
CLAIM = """
import sys
from pathlib import Path
from rankwise.jobs.store import JobStore
from rankwise.worker.local_placer import this_worker
store = JobStore(sys.argv[1], lock=Path(sys.argv[2]))
(job,) = store.claim(this_worker(), lease=600)
print(this_worker().host)
"""


@pytest.mark.parametrize(
    ("link", "found"), [("pid:[4026531836]", "gpu-1"), ("pid:[4026532201]", "gpu-1/361"), ("odd", "gpu-1")]
)
def test_the_name_of_a_machine_is_its_own_and_that_of_a_container_has_a_number(monkeypatch, link, found):
    monkeypatch.setattr("socket.gethostname", lambda: "gpu-1")
    monkeypatch.setattr("os.readlink", lambda path: link)
    assert host_name() == found
    assert this_worker().name == f"{found}:{os.getpid()}"


def test_a_claim_of_another_container_of_the_same_name_is_left_alone(tmp_path):
    if shutil.which("unshare") is None or subprocess.run([*CONTAINER, ""], capture_output=True).returncode:
        pytest.skip("no namespaces can be made here")
    url = f"sqlite:///{tmp_path / 'q.db'}"
    store = JobStore(url, lock=tmp_path / "lock")
    store.submit([NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash="a", spec={})])
    done = subprocess.run([*CONTAINER, CLAIM, url, str(tmp_path / "lock")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(os.uname().nodename)
    assert store.reclaim(host=host_name(), alive=[os.getpid()]) == []
    assert store.reclaim(host=done.stdout.strip(), alive=[]) != [], "its own place sees that the process has ended"
    store.close()
