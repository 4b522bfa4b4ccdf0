import pytest
from helpers.alias_contract import AliasContract

from rankwise.jobs.store import JobStore


class TestSqlite(AliasContract):
    @pytest.fixture
    def store(self, tmp_path):
        store = JobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock")
        yield store
        store.close()
