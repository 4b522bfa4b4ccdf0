import pytest

from rankwise.jobs.job import Attempt, Job, JobKind, JobState
from rankwise.jobs.queries import packs, remaining_seconds


def attempt(job_id, started=0.0, ended=None, **changes):
    values = {
        "token": f"t{job_id}", "job_id": job_id, "number": 1, "worker": "w", "host": "h", "pid": 1,
        "started_at": started, "lease_until": 0.0, "ended_at": ended,
    }  # fmt: skip
    return Attempt(**{**values, **changes})


def job(job_id, pack_id="p", kind=JobKind.TRAIN):
    return Job(id=job_id, kind=kind, experiment="e", spec_hash="s", spec={}, state=JobState.RUNNING, pack_id=pack_id)


def test_open_attempts_are_shown_by_pack_with_the_progress_of_the_slowest():
    jobs = {1: job(1), 2: job(2), 3: job(3, pack_id="q", kind=JobKind.EVALUATE)}
    quick = {"phase": "train", "step": 40, "steps": 40, "tokens_per_second": 90.0}
    slow = {"phase": "train", "step": 10, "steps": 40, "tokens_per_second": 90.0}
    first, second = packs(
        jobs,
        [
            attempt(1, 5, progress=quick, progress_at=18.0),
            attempt(2, 5, progress=slow, progress_at=17.0),
            attempt(3, 9),
        ],
        time=20.0,
    )
    assert (first.jobs, first.phase, first.step, first.steps) == ((1, 2), "train", 10, 40)
    assert (first.tokens_per_second, first.seconds, first.silent) == (180.0, 15.0, 2.0)
    assert (second.jobs, second.kind, second.phase, second.silent) == ((3,), JobKind.EVALUATE, None, None)


def test_an_attempt_whose_job_was_not_read_is_left_out():
    assert packs({}, [attempt(1)], time=1.0) == []


def test_the_pace_of_late_counts_pauses_neither_once_nor_twice():
    # Two workers side by side for 10 s, a long pause, one for 10 s: 4 jobs in 20 s of work.
    recent = [attempt(4, 1005, 1010), attempt(3, 1000, 1005), attempt(2, 0, 10), attempt(1, 0, 10)]
    running = [attempt(5, 2000, progress={"step": 5, "steps": 10})]
    assert remaining_seconds(queued=3, running=running, recent=recent, time=2001) == pytest.approx(3.5 / (4 / 20))
    assert remaining_seconds(queued=0, running=running, recent=recent, time=2001) == pytest.approx(0.5 / (4 / 20))


def test_before_anything_has_succeeded_the_steps_tell():
    running = [attempt(1, 0, progress={"step": 10, "steps": 40}), attempt(2, 0, progress={"step": 20, "steps": 40})]
    # In 30 s a quarter and a half of a job were done; left are 2 queued, three quarters and a half.
    expected = (2 + 0.75 + 0.5) / ((0.25 + 0.5) / 30)
    assert remaining_seconds(queued=2, running=running, recent=[], time=30) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("queued", "running", "expected"),
    [
        (0, [], 0.0),
        (5, [], None),
        (5, [attempt(1)], None),
        (5, [attempt(1, progress={"phase": "load", "steps": 40})], None),
        (5, [attempt(1, progress={"phase": "evaluate", "step": 3})], None),
    ],
    ids=["nothing left", "nobody works", "nothing known yet", "no step yet", "nobody knows how many steps"],
)
def test_what_cannot_be_told_is_not_told(queued, running, expected):
    assert remaining_seconds(queued=queued, running=running, recent=[], time=10) == expected
