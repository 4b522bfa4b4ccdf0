import threading
import time
from dataclasses import replace

import pytest
from helpers.waiting import until

from rankwise.exceptions import JobStoreError
from rankwise.jobs.job import JobKind, NewJob, Outcome, Worker
from rankwise.jobs.store import JobStore
from rankwise.worker.heartbeat import Heartbeat, Timing, lease_clock

WORKER = Worker(name="w", host="h", pid=1)
QUICK = Timing(lease=60.0, beat=0.01, watch=0.01)


@pytest.fixture
def queue(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock")
    yield store
    store.close()


def claim(queue, count=1, lease=60.0):
    new = [
        NewJob(kind=JobKind.TRAIN, experiment="e", spec_hash=str(number), spec={}, pack_key="p")
        for number in range(count)
    ]
    queue.submit(new)
    return queue.claim(WORKER, lease=lease, max_arms=count)


def beating(queue, jobs, timing=QUICK):
    heartbeat = Heartbeat(queue, timing, WORKER)
    heartbeat.hold(jobs, lease_clock())
    return heartbeat


def test_a_claim_stays_alive_while_its_worker_computes(queue):
    jobs = claim(queue, lease=0.6)
    with beating(queue, jobs, replace(QUICK, lease=0.6)) as heartbeat:
        time.sleep(0.9)
        assert queue.reclaim() == []
        assert heartbeat.confirmed(jobs[0].token)
    assert queue.holds(jobs[0].token)


def test_a_lost_claim_is_noticed(queue):
    lost, _ = claim(queue, 2, lease=-1)
    queue.reclaim()
    (again, _) = queue.claim(WORKER, lease=60, max_arms=2)
    with beating(queue, [lost, again]) as heartbeat:
        until(lambda: not heartbeat.holds(lost.token))
        assert heartbeat.holds(again.token)
        assert heartbeat.status_message()["lost"] == [lost.token]


def test_a_wish_to_cancel_arrives_without_a_heartbeat(queue):
    first, second = claim(queue, 2)
    with beating(queue, [first, second], replace(QUICK, beat=100.0)) as heartbeat:
        before = heartbeat.changes
        queue.cancel([first.id])
        until(lambda: heartbeat.cancelled(first.token))
        assert not heartbeat.cancelled(second.token)
        assert heartbeat.changes == before + 1


def test_a_finished_job_is_not_taken_for_a_lost_one(queue):
    first, second = claim(queue, 2)
    with beating(queue, [first, second]) as heartbeat:
        queue.finish(first.token, Outcome.SUCCEEDED)
        heartbeat.release(first.token)
        time.sleep(0.05)
        assert heartbeat.status_message()["lost"] == []
        assert heartbeat.status_message()["until"].keys() == {second.token}


def test_progress_travels_with_the_heartbeat(queue):
    (job,) = claim(queue)
    with beating(queue, [job]) as heartbeat:
        heartbeat.add_progress(job.token, {"step": 3})
        heartbeat.add_progress(job.token, {"checkpoint": 2})
        until(lambda: queue.attempts(job.id)[0].progress == {"step": 3, "checkpoint": 2})


def test_a_job_that_says_nothing_new_is_seen_to_be_silent(queue):
    (job,) = claim(queue)
    with beating(queue, [job]) as heartbeat:
        heartbeat.add_progress(job.token, {"step": 3})
        until(lambda: queue.attempts(job.id)[0].progress_at)
        heard = queue.attempts(job.id)[0]
        until(lambda: queue.attempts(job.id)[0].lease_until > heard.lease_until + 0.1)
        assert queue.attempts(job.id)[0].progress_at == heard.progress_at


def test_after_the_machine_has_slept_for_longer_than_the_lease_nothing_is_certain(queue, monkeypatch):
    (job,) = claim(queue)
    heartbeat = beating(queue, [job])
    assert heartbeat.confirmed(job.token)
    real = time.clock_gettime
    slept = {time.CLOCK_BOOTTIME: 61.0}  # The clocks that count it; `monotonic` does not (clock_gettime(2)).
    monkeypatch.setattr("time.clock_gettime", lambda clock: real(clock) + slept.get(clock, 0.0))
    assert not heartbeat.confirmed(job.token)


def test_what_breaks_one_beat_does_not_end_the_heart(queue, caplog):
    (job,) = claim(queue, lease=0.6)
    said = []

    def info():
        said.append(None)
        if len(said) == 2:
            raise AttributeError("a bug")
        return {}

    heartbeat = Heartbeat(queue, replace(QUICK, lease=0.6, announce=0.05), WORKER, info)
    heartbeat.hold([job], lease_clock())
    with heartbeat:
        until(lambda: len(said) > 3)
        assert "AttributeError: a bug" in caplog.text
        time.sleep(0.6)
        assert heartbeat.confirmed(job.token)


def test_an_outage_of_the_database_loses_nothing_until_the_lease_is_over(queue, monkeypatch, caplog):
    (job,) = claim(queue)
    away = threading.Event()
    away.set()
    real = queue.beat

    def beat(*arguments, **named):
        if away.is_set():
            raise JobStoreError("away")
        return real(*arguments, **named)

    monkeypatch.setattr(queue, "beat", beat)
    with beating(queue, [job], replace(QUICK, lease=0.3)) as heartbeat:
        until(lambda: "no heartbeat: away" in caplog.text)
        assert heartbeat.confirmed(job.token)
        until(lambda: not heartbeat.confirmed(job.token))
        assert heartbeat.holds(job.token), "nobody has taken it, as far as is known"
        away.clear()
        until(lambda: heartbeat.confirmed(job.token))


def test_a_worker_is_listed_while_it_lives(queue):
    with Heartbeat(queue, replace(QUICK, announce=0.01), WORKER, lambda: {"state": "idle"}):
        (there,) = queue.workers()
        assert (there.name, there.info) == ("w", {"state": "idle"})
    assert queue.workers() == []
