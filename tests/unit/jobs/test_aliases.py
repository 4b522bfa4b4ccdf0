import pytest
from helpers.alias_contract import AliasContract

from rankwise.jobs.store import SqlJobStore


class TestSqlite(AliasContract):
    @pytest.fixture
    def store(self, tmp_path):
        store = SqlJobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock")
        yield store
        store.close()
