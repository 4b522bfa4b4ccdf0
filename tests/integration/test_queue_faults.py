"""The queue under faults, on both databases: many processes, outages, kills between any two statements."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.databases import emptied
from helpers.fault_table import record
from sqlalchemy import event

from rankwise.exceptions import JobStoreError
from rankwise.jobs import queries as health
from rankwise.jobs.job import JobKind, JobState, NewJob, Outcome, Worker
from rankwise.jobs.store import JobStore

pytestmark = pytest.mark.faults
WORKER = Path(__file__).parents[1] / "helpers" / "queue_worker.py"
PROCESSES = 8


@pytest.fixture(params=["SQLite", "PostgreSQL"])
def url(request, tmp_path):
    if request.param == "SQLite":
        yield f"sqlite:///{tmp_path / 'q.db'}"
        return
    url = request.getfixturevalue("postgresql")
    emptied(url)
    yield url
    emptied(url)


def named(url):
    return "SQLite" if url.startswith("sqlite") else "PostgreSQL"


def jobs(count, **changes):
    values = {"kind": JobKind.TRAIN, "experiment": "e", "spec": {}, "pack_key": "p"} | changes
    return [NewJob(spec_hash=f"{number:05}", **values) for number in range(count)]


def start(url, notes, *options):
    command = [sys.executable, str(WORKER), "--url", url, "--notes", str(notes), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def claims(notes):
    """How often each job was claimed, as the workers noted it themselves."""
    return Counter(
        int(line.split()[0])
        for path in notes.iterdir()
        if path.name != "lock"
        for line in path.read_text().splitlines()
    )


def finish(processes):
    processes = list(processes)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


def test_eight_processes_share_two_thousand_jobs(url, tmp_path):
    count = 2000
    store = JobStore(url, lock=tmp_path / "lock")
    store.submit(jobs(count))
    since = time.monotonic()
    finish([start(url, tmp_path / "notes", "--drain", "--arms", "3") for _ in range(PROCESSES)])
    seconds = time.monotonic() - since
    noted = claims(tmp_path / "notes")
    assert len(noted) == count
    assert set(noted.values()) == {1}, "a job was claimed twice"
    assert store.counts()[JobState.SUCCEEDED] == count
    assert health.check(url).problems == ()
    store.close()
    record(
        f"8 processes, 2,000 jobs, {named(url)}",
        "0 double claims, 0 lost, 0 busy errors",
        f"{len(noted)} claimed once each, 0 errors, {seconds:.0f} s",
    )


def test_sqlite_locked_for_twenty_seconds(tmp_path):
    url, seconds = f"sqlite:///{tmp_path / 'q.db'}", 20
    store = JobStore(url, lock=tmp_path / "lock")
    store.submit(jobs(40))
    workers = [start(url, tmp_path / "notes", "--drain", "--seconds", "0.2") for _ in range(2)]
    until(lambda: store.counts()[JobState.SUCCEEDED] >= 4)
    locker = sqlite3.connect(tmp_path / "q.db", isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    before = store.counts()[JobState.SUCCEEDED]
    time.sleep(seconds)
    assert store.counts()[JobState.SUCCEEDED] == before, "readers see what was before the lock"
    locker.execute("ROLLBACK")
    locker.close()
    finish(workers)
    assert set(claims(tmp_path / "notes").values()) == {1}
    counts = store.counts()
    assert counts[JobState.SUCCEEDED] == 40
    assert all(job.lost == job.failures == job.preemptions == 0 for job in store.jobs())
    store.close()
    record(f"SQLite locked for {seconds} s", "0 lost, 0 busy errors", "40 of 40 jobs, each claimed once")


def test_postgresql_restarted(postgresql, postgresql_server, tmp_path):
    emptied(postgresql)
    store = JobStore(postgresql, lock=tmp_path / "lock")
    store.submit(jobs(60))
    options = ("--drain", "--seconds", "0.3", "--lease", "20")
    workers = [start(postgresql, tmp_path / "notes", *options) for _ in range(3)]
    outages = 0.0
    for _ in range(2):
        done = store.counts()[JobState.SUCCEEDED]
        until(lambda done=done: store.counts()[JobState.SUCCEEDED] >= done + 6)
        since = time.monotonic()
        postgresql_server.stop()
        with pytest.raises(JobStoreError, match="the queue's database failed"):
            store.counts()
        time.sleep(2)
        postgresql_server.ensure_postgres_running()
        outages += time.monotonic() - since
    until(lambda: store.counts()[JobState.SUCCEEDED] > 0)
    finish(workers)
    outcomes = Counter(str(attempt.outcome) for job in store.jobs() for attempt in store.attempts(job.id))
    assert store.counts()[JobState.SUCCEEDED] == outcomes["succeeded"] == 60
    # A claim whose answer was lost with the connection comes back when its lease has run out.
    assert outcomes.keys() <= {"succeeded", "lost"}
    assert outcomes["lost"] <= 6
    assert health.check(postgresql).problems == ()
    store.close()
    emptied(postgresql)
    record(
        "PostgreSQL restarted twice",
        "0 jobs lost, each ends once",
        f"60 of 60 jobs, {outages:.0f} s away, {outcomes['lost']} attempts lost",
    )


def until(condition, limit=120.0):
    deadline = time.monotonic() + limit
    while True:
        try:
            if condition():
                return
        except JobStoreError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_killed_between_any_two_statements_nothing_is_stuck(url, tmp_path):
    """A process that dies before any of its statements, or before a commit, leaves whole states only."""
    rounds = 1000 if named(url) == "SQLite" else 300
    chance = random.Random(7)
    store = JobStore(url, lock=tmp_path / "lock")
    left = [10**9]

    def count(*_arguments, **_named):
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    event.listen(store._engine, "before_cursor_execute", count)
    event.listen(store._engine, "commit", count)
    worker = Worker(name="w", host="h", pid=1)
    kills = 0
    made = 0

    def live():
        nonlocal made
        made += 3
        train = store.submit(jobs(made, pack_key="p")[-3:], again=True)
        store.submit(jobs(made, kind=JobKind.EVALUATE, after=(train[0].id,))[-1:])
        for job in store.claim(worker, lease=60, max_arms=3):
            store.beat([job.token], lease=60, progress={job.token: {"checkpoint": made}})
            store.uploading(job.token, {})
            store.finish(job.token, chance.choice([each for each in Outcome if each is not Outcome.LOST]))
        store.settle([job.id for job in store.jobs(states=[JobState.QUEUED]) if job.held], {})
        ended = store.jobs(states=[JobState.FAILED, JobState.CANCELLED], limit=2)
        store.retry([job.id for job in ended])
        store.cancel([chance.randint(1, made)])

    for _ in range(rounds):
        left[0] = chance.randint(0, 60)
        try:
            live()
        except Killed:
            kills += 1
        left[0] = 10**9
        # Whoever comes next finds the process dead.
        store.reclaim(host="h", alive=[])
        if made > 60:
            drain(store, worker)
            made = 0
            with store._engine.begin() as connection:
                for table in ("attempt", "job_dependency", "job"):
                    connection.exec_driver_sql(f"DELETE FROM {table}")
    drain(store, worker)
    assert kills > rounds * 0.7
    assert health.check(url).problems == ()
    store.close()
    record(f"killed between two statements, {named(url)}", "0 stuck jobs", f"{kills} kills in {rounds} lives, 0 stuck")


def drain(store, worker):
    """Do all that is left; whatever stays is stuck."""
    for _ in range(300):
        store.reclaim(host="h", alive=[])
        store.settle([job.id for job in store.jobs(states=[JobState.QUEUED]) if job.held], {})
        with store._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE job SET not_before = 0")
        claimed = store.claim(worker, lease=60, max_arms=9)
        for job in claimed:
            assert store.finish(job.token, Outcome.SUCCEEDED)
        if not claimed:
            break
    assert [job for job in store.jobs() if not job.ended] == []


def test_the_clock_of_a_worker_decides_nothing(url, tmp_path, monkeypatch):
    """An hour ahead or behind: leases, waits and the order of attempts come from the database's clock alone."""
    real = time.time
    store = JobStore(url, lock=tmp_path / "lock")
    store.submit(jobs(6))
    found = []
    for shift in (3600.0, -3600.0):
        monkeypatch.setattr(time, "time", lambda shift=shift: real() + shift)
        (job,) = store.claim(Worker(name="w", host="h", pid=1), lease=30)
        assert store.reclaim() == []
        assert store.beat([job.token], lease=30).held == {job.token}
        assert store.reclaim() == []
        (attempt,) = store.attempts(job.id)
        store.finish(job.token, Outcome.FAILED)
        after = store.get(job.id)
        monkeypatch.undo()
        assert abs(attempt.started_at - real()) < 30
        assert 0 < attempt.lease_until - attempt.started_at < 40
        assert 9 < after.not_before - after.updated_at < 11
        assert store.claim(Worker(name="w", host="h", pid=1), lease=30, among=[job.id]) == [], "it waits"
        found.append(attempt.started_at)
    assert found == sorted(found)
    store.close()
    record(f"a worker's clock an hour off, {named(url)}", "no decision changes", "leases, waits and order unchanged")


OPEN = """
import sys
from pathlib import Path
from rankwise.jobs.store import JobStore
JobStore(sys.argv[1], lock=Path(sys.argv[2])).close()
"""


def open_in_four_processes(url, locks):
    """Several processes find an empty database at the same time."""
    finish(
        subprocess.Popen(
            [sys.executable, "-c", OPEN, url, str(lock)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for lock in locks
    )
    assert health.check(url).problems == ()


def test_four_processes_start_on_an_empty_home(tmp_path):
    rounds = 5
    for number in range(rounds):
        home = tmp_path / f"home-{number}"
        open_in_four_processes(f"sqlite:///{home / 'rankwise.db'}", [home / "queue.lock"] * 4)
    record("4 processes open an empty queue", "all run, one migration", f"{rounds} times, 0 errors")


def test_machines_that_share_a_postgresql_migrate_once(postgresql, tmp_path):
    rounds = 3
    for _ in range(rounds):
        emptied(postgresql)
        # A lock file of its own each: these are several machines.
        open_in_four_processes(postgresql, [tmp_path / f"lock-{number}" for number in range(4)])
    emptied(postgresql)
    record("4 machines open an empty PostgreSQL", "all run, one migration", f"{rounds} times, 0 errors")
