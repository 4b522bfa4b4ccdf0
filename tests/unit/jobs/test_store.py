import shutil
import sqlite3

import pytest
from helpers.job_store_contract import JobStoreContract, new
from sqlalchemy.exc import DBAPIError

from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import Limits
from rankwise.jobs.store import JobStore


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """A database of the newest revision: copied, since a migration takes longer than a test."""
    path = tmp_path_factory.mktemp("empty") / "home" / "q.db"
    JobStore(f"sqlite:///{path}", lock=path.with_name("lock")).close()
    return path


class TestSqlite(JobStoreContract):
    @pytest.fixture
    def store(self, tmp_path, empty):
        path = shutil.copy(empty, tmp_path / "q.db")
        store = JobStore(f"sqlite:///{path}", lock=tmp_path / "lock", limits=Limits(backoff=0.1))
        yield store
        store.close()

    @pytest.mark.parametrize(
        ("state", "tries", "more"), [("40P01", 5, 0), ("40P01", 5, 1), ("40001", 2, 0), ("23505", 1, 1)]
    )
    def test_the_victim_of_a_deadlock_tries_again_but_not_for_ever(self, store, state, tries, more):
        class Refused(Exception):
            sqlstate = state

        tried = []

        def work(connection):
            tried.append(connection)
            if len(tried) < tries + more:
                raise DBAPIError("UPDATE job", {}, Refused("refused"))
            return "done"

        if more:
            with pytest.raises(JobStoreError, match="testing: the queue's database failed: refused"):
                store._write("testing", work)
        else:
            assert store._write("testing", work) == "done"
        assert len(tried) == tries

    def test_whoever_only_looks_waits_for_nobody_who_writes(self, store, tmp_path, monkeypatch):
        store.submit([new("a")])
        monkeypatch.setattr("rankwise.jobs.database.BUSY_TIMEOUT_S", 0.1)
        writer = sqlite3.connect(tmp_path / "q.db", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        other = JobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock")
        assert (len(other.jobs()), other.workers(), other.held()) == (1, [], 0)
        with pytest.raises(JobStoreError, match="locked"):
            other.submit([new("b")])
        other.close()
        writer.close()
