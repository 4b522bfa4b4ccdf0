import signal
import sqlite3
import time
from dataclasses import replace

import pytest
from helpers.stopped import LOCKER, WRITER, holding

from rankwise.jobs.job import JobKind, NewJob, Worker
from rankwise.jobs.store import JobStore
from rankwise.lock_holders import start_of
from rankwise.worker.lock_watch import ANNOUNCES, CHILD, CHILD_STARTED, STARTED, LockWatch


@pytest.fixture
def queue(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock")
    yield store
    store.close()


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "mlflow.db"
    sqlite3.connect(path).close()
    return path


def watch(queue, *databases, locks=(), hung=60.0):
    return LockWatch(queue, host="here", databases=databases, lock_files=lambda: locks, interval=0.05, hung=hung)


def check_twice(watch):
    assert watch.check() == []
    time.sleep(0.01)
    return [holder.pid for holder in watch.check()]


def announce(queue, process, *, lease=-1.0, **changes):
    worker = Worker(name=f"here:{process.pid}", host="here", pid=process.pid)
    if lease is not None:
        queue.submit([NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash="1", spec={}, pack_key="p")])
        assert queue.claim(worker, lease=lease)
    worker = replace(worker, **{key: changes.pop(key) for key in ("host", "pid") if key in changes})
    queue.announce(worker, {STARTED: start_of(process.pid), ANNOUNCES: 30.0, **changes})


def test_a_stopped_worker_whose_lease_has_expired_is_ended(queue, database, caplog):
    with holding(WRITER, database) as process:
        announce(queue, process)
        assert check_twice(watch(queue, database)) == [process.pid]
        assert process.wait(10) == -signal.SIGKILL
    assert f"ended process {process.pid} of worker here:{process.pid}, whose lease has expired" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"lease": 60.0}, {"lease": None}, {"host": "elsewhere"}, {STARTED: 1}], ids=lambda changes: str(changes)
)
def test_any_other_stopped_process_is_named_once_and_left_alone(queue, database, caplog, changes):
    with holding(WRITER, database) as process:
        announce(queue, process, **changes)
        checking = watch(queue, database)
        assert check_twice(checking) == []
        assert check_twice(checking) == []
        assert process.poll() is None
    assert caplog.text.count(f"other processes wait: process {process.pid} ") == 1


def test_a_worker_without_jobs_is_ended_when_it_no_longer_announces_itself(queue, database):
    with holding(WRITER, database) as process:
        announce(queue, process, lease=None, **{ANNOUNCES: 0.01})
        time.sleep(0.1)
        assert check_twice(watch(queue, database)) == [process.pid]


def test_a_child_is_known_by_its_worker(queue, database):
    with holding(WRITER, database) as process, holding(LOCKER, database.with_name("x"), stopped=False) as parent:
        announce(queue, parent, **{CHILD: process.pid, CHILD_STARTED: start_of(process.pid)})
        assert check_twice(watch(queue, database)) == [process.pid]
        assert parent.poll() is None


def test_a_running_worker_that_lost_its_lease_counts_as_hung_after_a_while(queue, database):
    with holding(WRITER, database, stopped=False) as process:
        announce(queue, process)
        assert check_twice(watch(queue, database)) == []
        assert check_twice(watch(queue, database, hung=0.001)) == [process.pid]


def test_a_stopped_worker_with_a_lock_file_is_ended(queue, tmp_path):
    path = tmp_path / "x.lock"
    with holding(LOCKER, path) as process:
        announce(queue, process)
        assert check_twice(watch(queue, locks=[path])) == [process.pid]


LATE_WRITER = """
import os, signal, sqlite3, sys
print("holds", flush=True)
sys.stdin.readline()
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_the_thread_ends_a_stopped_process_that_locked_the_queue(queue, tmp_path):
    with holding(LATE_WRITER, tmp_path / "q.db", stopped=False) as process:
        announce(queue, process)
        process.stdin.write("\n")
        process.stdin.flush()
        with watch(queue, tmp_path / "q.db"):
            assert process.wait(20) == -signal.SIGKILL
    queue.submit([NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash="2", spec={})])
