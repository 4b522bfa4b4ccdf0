"""`rankwise ui` as a process: the address on stdout, Ctrl-C, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import requests
from helpers.fault_table import record
from helpers.local_store import prepared_home


def start(home):
    return subprocess.Popen(
        [sys.executable, "-m", "rankwise.cli.main", "ui", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RANKWISE_HOME": str(home)},
    )


def test_the_ui_serves_this_machine_only_and_ends_cleanly(tmp_path):
    settings = prepared_home(tmp_path / "home")
    process = start(settings.home)
    url = process.stdout.readline().strip()
    children = psutil.Process(process.pid).children(recursive=True)
    assert url.startswith("http://127.0.0.1:")
    assert "<title>" in requests.get(url, timeout=120).text
    assert requests.get(url, headers={"Host": "10.attacker.example"}, timeout=120).status_code == 403
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err
    assert err.strip().endswith("The MLflow UI has stopped.")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert alive == []


@pytest.mark.faults
def test_a_ui_that_is_killed_leaves_no_server(tmp_path):
    process = start(prepared_home(tmp_path / "home").home)
    url = process.stdout.readline().strip()
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    began = time.monotonic()
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert len(children) >= 2
    assert alive == []
    with pytest.raises(requests.ConnectionError):
        requests.get(url, timeout=5)
    record(
        "kill -9 of `rankwise ui`",
        "its server ends too",
        f"{len(children)} processes gone after {time.monotonic() - began:.1f} s",
    )
