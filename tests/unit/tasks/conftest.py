import pytest

from rankwise.jobs.store import SqlJobStore


@pytest.fixture
def queue(tmp_path):
    """A queue of its own, on SQLite."""
    made = SqlJobStore(f"sqlite:///{tmp_path / 'queue.db'}", lock=tmp_path / "queue.lock")
    yield made
    made.close()
