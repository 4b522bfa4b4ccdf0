import os
import signal
import sqlite3
import threading
from dataclasses import replace

import pytest
from helpers.stopped import LOCKER, READER, WRITER, holding
from helpers.waiting import until

from rankwise.exceptions import JobStoreError
from rankwise.files import file_lock
from rankwise.jobs.job import JobKind, NewJob
from rankwise.jobs.store import JobStore
from rankwise.lock_holders import database_holders, describe_holders, lock_holders, start_of
from rankwise.tracking.connection import describe


@pytest.fixture(params=["delete", "wal"])
def database(tmp_path, request):
    path = tmp_path / "x.db"
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA journal_mode={request.param}")
    connection.execute("CREATE TABLE t (x)")
    yield path
    connection.close()


def test_a_stopped_writer_is_named_with_what_to_do(database):
    with holding(WRITER, database) as process:
        (holder,) = database_holders(database)
        assert (holder.pid, holder.stopped, holder.started) == (process.pid, True, start_of(process.pid))
        assert holder.text().endswith(
            f"; stopped) holds the lock of {database}: resume it with `kill -CONT {process.pid}`, or end it with "
            f"`kill -KILL {process.pid}`"
        )
        process.send_signal(signal.SIGCONT)
        until(lambda: not database_holders(database)[0].stopped)
        assert f"; running) holds the lock of {database}; if it does not" in describe_holders(
            database_holders(database)
        )
    assert database_holders(database) == []
    assert describe_holders([]) == ""


@pytest.mark.parametrize(("mode", "blocks"), [("delete", True), ("wal", False)])
def test_a_stopped_reader_blocks_without_wal_only(tmp_path, mode, blocks):
    path = tmp_path / "x.db"
    connection = sqlite3.connect(path, isolation_level=None, timeout=0.1)
    connection.execute(f"PRAGMA journal_mode={mode}")
    connection.execute("CREATE TABLE t (x)")
    with holding(READER, path) as process:
        assert [holder.pid for holder in database_holders(path)] == ([process.pid] if blocks else [])
        if blocks:
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                connection.execute("INSERT INTO t VALUES (1)")
        else:
            connection.execute("INSERT INTO t VALUES (1)")
    connection.close()


def test_a_number_that_belongs_to_another_process_by_now_is_not_killed(database):
    with holding(WRITER, database) as process:
        (holder,) = database_holders(database)
        replace(holder, started=holder.started - 1).kill()
        assert process.poll() is None
        holder.kill()
        assert process.wait(10) == -signal.SIGKILL
        holder.kill()


def test_looking_keeps_the_locks_of_this_process(database):
    mine = sqlite3.connect(database, isolation_level=None)
    mine.execute("BEGIN IMMEDIATE")
    assert database_holders(database) == []
    other = sqlite3.connect(database, isolation_level=None, timeout=0.1)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    mine.close()
    other.close()


def test_whoever_waits_for_a_lock_file_names_its_stopped_holder(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("rankwise.files._LOCK_WAIT_S", 0.1)
    path = tmp_path / "x.lock"
    done = threading.Event()

    def wait():
        with file_lock(path, "building the cache"):
            done.set()

    with holding(LOCKER, path) as process:
        assert [holder.pid for holder in lock_holders(path)] == [process.pid]
        threading.Thread(target=wait, daemon=True).start()
        expected = f"building the cache: waiting for a lock: process {process.pid} "
        until(lambda: expected in caplog.text, 10)
        assert not done.is_set()
    assert done.wait(10)
    assert caplog.text.count("waiting for a lock") == 1


def test_a_locked_queue_names_the_stopped_process(tmp_path, monkeypatch):
    store = JobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock")
    store.close()
    monkeypatch.setattr("rankwise.jobs.database.BUSY_TIMEOUT_S", 0.1)
    store = JobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock")
    job = NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash="1", spec={})
    with holding(WRITER, tmp_path / "q.db") as process:
        with pytest.raises(JobStoreError, match=rf"was locked for 0.1 s: process {process.pid} .*kill -CONT"):
            store.submit([job])
        assert store.jobs() == []
    assert len(store.submit([job])) == 1
    store.close()


def test_a_locked_mlflow_store_names_the_stopped_process(database):
    error = sqlite3.OperationalError("database is locked")
    assert "another process has locked the database" in describe(error, database)
    with holding(WRITER, database) as process:
        assert f"the store's database is locked (process {process.pid} " in describe(error, database)
    assert os.getpid() not in [holder.pid for holder in database_holders(database)]
