import pytest
from helpers.job_store_contract import JobStoreContract

from rankwise.jobs.job import Limits
from rankwise.jobs.sql_store import SqlJobStore


class TestSqlite(JobStoreContract):
    @pytest.fixture
    def store(self, tmp_path):
        store = SqlJobStore(
            f"sqlite:///{tmp_path / 'home' / 'q.db'}", lock=tmp_path / "lock", limits=Limits(backoff=0.1)
        )
        yield store
        store.close()
