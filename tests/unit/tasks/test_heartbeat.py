import time

import pytest

from rankwise.jobs.job import JobKind, NewJob, Outcome, Worker
from rankwise.jobs.sql_store import SqlJobStore
from rankwise.tasks.heartbeat import Heartbeat

WORKER = Worker(name="w", host="h", pid=1)


@pytest.fixture
def queue(tmp_path):
    store = SqlJobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock")
    yield store
    store.close()


def claim(queue, count=1, lease=60.0):
    new = [
        NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash=str(number), spec={}, pack_key="p")
        for number in range(count)
    ]
    queue.submit(new)
    return queue.claim(WORKER, lease=lease, max_arms=count)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_claim_stays_alive_while_its_worker_computes(queue):
    (job,) = claim(queue, lease=1.0)
    with Heartbeat(queue, [job.token], interval=0.01):
        time.sleep(1.2)
        assert queue.reclaim() == []
    assert queue.holds(job.token)


def test_a_lost_claim_is_noticed(queue):
    lost, kept = claim(queue, 2, lease=-1)
    queue.reclaim()
    (again, _) = queue.claim(WORKER, lease=60, max_arms=2)
    with Heartbeat(queue, [lost.token, again.token], interval=0.01) as heart:
        until(lambda: not heart.holds(lost.token))
        assert heart.holds(again.token)
        assert not heart.holds(kept.token)


def test_a_wish_to_cancel_arrives(queue):
    first, second = claim(queue, 2)
    with Heartbeat(queue, [first.token, second.token], interval=0.01) as heart:
        assert not heart.cancelled(first.token)
        queue.cancel([first.id])
        until(lambda: heart.cancelled(first.token))
        assert not heart.cancelled(second.token)


def test_a_finished_job_is_not_taken_for_a_lost_one(queue):
    first, second = claim(queue, 2)
    with Heartbeat(queue, [first.token, second.token], interval=0.01) as heart:
        queue.finish(first.token, Outcome.SUCCEEDED)
        heart.release(first.token)
        time.sleep(0.05)
        assert not heart.holds(first.token)
        assert heart.holds(second.token)


def test_an_outage_of_the_database_loses_nothing_by_itself(queue, monkeypatch, caplog):
    from rankwise.exceptions import JobStoreError

    (job,) = claim(queue)

    def away(*arguments, **named):
        raise JobStoreError("away")

    monkeypatch.setattr(queue, "beat", away)
    with Heartbeat(queue, [job.token], interval=0.01) as heart:
        until(lambda: "no heartbeat: away" in caplog.text)
        assert heart.holds(job.token)
