"""Every test gets its own home, no network, and quiet libraries."""

from __future__ import annotations

import os
import signal
import tempfile

import pytest
from helpers import warm
from helpers.fault_table import print_rows

# Before any library is imported: they read these once.
os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.mkdtemp(prefix="rankwise-runtime-"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two test processes on two cores: more threads would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
# Numbers are compared in float32, on CPUs with fast bfloat16 too.
os.environ["RANKWISE_COMPUTE_DTYPE"] = "float32"

# What a shell starts in the background ignores Ctrl-C, and every program that tests start and end would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    # The process that leads; xdist's workers find the server through the environment.
    if not hasattr(config, "workerinput"):
        config.add_cleanup(warm.start())


@pytest.fixture(autouse=True)
def _own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    for name in (
        *("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RANKWISE_DATABASE_URL", "RANKWISE_BASES"),
        *("RANKWISE_DATA_ROOT", "RANKWISE_SIGNING_KEY", "RANKWISE_TRUSTED_KEYS", "RANKWISE_WORK", "RANKWISE_UMASK"),
    ):
        monkeypatch.delenv(name, raising=False)
    # The command line closes new files to others, for its process.
    umask = os.umask(0o022)
    os.umask(umask)
    yield
    os.umask(umask)
    os.environ.pop("RANKWISE_UMASK", None)


def pytest_terminal_summary(terminalreporter):
    print_rows(terminalreporter.write_line)
