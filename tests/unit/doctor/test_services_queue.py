from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from rankwise.doctor import services
from rankwise.doctor.finding import HealthState
from rankwise.jobs.job import JobKind, NewJob, Worker
from rankwise.jobs.store import JobStore
from rankwise.settings import Settings


@pytest.fixture
def settings(tmp_path):
    settings = Settings.load()
    store = JobStore(settings.database_url, lock=tmp_path / "lock")
    store.submit([NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash=name, spec={}) for name in "ab"])
    store.announce(Worker(name="w1", host="h", pid=1), {})
    store.close()
    return settings


def look(settings):
    return {each.name: each for each in services.queue(settings)}


def edit(settings, statement):
    with closing(sqlite3.connect(settings.home / "rankwise.db")) as connection, connection:
        connection.execute(statement)


def test_a_queue_in_order_is_told_with_its_clock_and_workers(settings):
    found = look(settings)
    assert {each.state for each in found.values()} == {HealthState.OK}
    assert "2 jobs" in found["queue.database"].seen
    assert found["queue.workers"].seen == "1 workers, 2 jobs wait"


def test_a_queue_that_is_not_there_is_skipped_and_not_made():
    settings = Settings.load()
    assert look(settings)["queue.database"].state is HealthState.SKIPPED
    assert not settings.home.exists()


def test_a_queue_of_another_revision_is_a_problem(settings):
    edit(settings, "UPDATE alembic_version SET version_num = '9999'")
    found = look(settings)
    assert list(found) == ["queue.database"]
    assert found["queue.database"].state is HealthState.PROBLEM
    assert "newer rankwise" in found["queue.database"].seen


def test_silent_workers_and_jobs_without_any_are_warnings(settings):
    edit(settings, "UPDATE worker SET seen_at = seen_at - 600")
    found = [each for each in services.queue(settings) if each.name == "queue.workers"]
    assert [each.state for each in found] == [HealthState.WARNING, HealthState.WARNING]
    assert found[0].seen == "silent: w1 (10 min)"
    assert found[1].seen == "2 jobs wait and no worker is running"


@pytest.mark.parametrize(
    ("off", "state"), [(0.5, HealthState.OK), (-30, HealthState.WARNING), (4000, HealthState.PROBLEM)]
)
def test_a_clock_that_is_off_is_found(settings, monkeypatch, off, state):
    from rankwise.jobs import queries as health

    here = health.time.time
    monkeypatch.setattr(health.time, "time", lambda: here() + off)
    found = look(settings)["queue.clock"]
    assert found.state is state
    assert f"{off:+.1f}"[:3] in found.seen


def test_a_database_that_does_not_answer_is_a_problem_without_its_password():
    from rankwise.doctor.checks import run_checks
    from rankwise.doctor.finding import HealthCheck

    url = "postgresql://ann:pa55word@127.0.0.1:1/queue"
    settings = Settings.load({"RANKWISE_DATABASE_URL": url})
    (found,) = run_checks(settings, [HealthCheck(name="queue.database", run=services.queue)])
    assert found.state is HealthState.PROBLEM
    assert "pa55word" not in str(found.to_json())
