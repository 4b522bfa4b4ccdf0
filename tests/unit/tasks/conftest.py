import pytest

from rankwise.jobs.store import JobStore


@pytest.fixture
def queue(tmp_path):
    """A queue of its own, on SQLite."""
    made = JobStore(f"sqlite:///{tmp_path / 'queue.db'}", lock=tmp_path / "queue.lock")
    yield made
    made.close()
