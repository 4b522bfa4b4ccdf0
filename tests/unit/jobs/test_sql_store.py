import shutil

import pytest
from helpers.job_store_contract import JobStoreContract

from rankwise.jobs.job import Limits
from rankwise.jobs.sql_store import SqlJobStore


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database of the newest revision: copied, since a migration takes longer than a test."""
    path = tmp_path_factory.mktemp("empty") / "home" / "q.db"
    SqlJobStore(f"sqlite:///{path}", lock=path.with_name("lock")).close()
    return path


class TestSqlite(JobStoreContract):
    @pytest.fixture
    def store(self, tmp_path, empty):
        path = shutil.copy(empty, tmp_path / "q.db")
        store = SqlJobStore(f"sqlite:///{path}", lock=tmp_path / "lock", limits=Limits(backoff=0.1))
        yield store
        store.close()
