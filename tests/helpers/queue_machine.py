"""A state machine that does to a queue all that may happen to it, and compares it with a model after every step.

The model is written from the words of the contract, not from the statements of the store: lists and dictionaries, one
thing after another. Workers die, come back as zombies, and finish twice; the database's clock jumps both ways.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rankwise.jobs import queries as health
from rankwise.jobs.job import ENDED, Job, JobKind, JobState, Limits, NewJob, Outcome, Worker

LIMITS = Limits(failures=2, lost=3, backoff=10.0, longest_backoff=15.0)
LEASE = 60.0
WORKERS = [Worker(name=f"w{number}", host=f"h{number % 2}", pid=number) for number in range(3)]
ENDINGS = [outcome for outcome in Outcome if outcome is not Outcome.LOST]
BAD = (JobState.FAILED, JobState.CANCELLED)
HELD = (JobState.RUNNING, JobState.UPLOADING)
pick = st.integers(min_value=0, max_value=10**6)


@dataclass
class Try:
    """The model of an attempt."""

    job: int
    worker: Worker
    lease_until: float
    outcome: Outcome | None = None


@dataclass
class Model:
    """The model of a queue."""

    now: float = 0.0
    jobs: dict[int, Job] = field(default_factory=dict)
    after: dict[int, set[int]] = field(default_factory=dict)
    tries: dict[str, Try] = field(default_factory=dict)

    def change(self, job_id: int, **values) -> None:
        self.jobs[job_id] = replace(self.jobs[job_id], **values)

    def waits(self, job_id: int) -> bool:
        return any(self.jobs[each].state is not JobState.SUCCEEDED for each in self.after[job_id])

    def eligible(self) -> list[Job]:
        found = [
            job
            for job in self.jobs.values()
            if job.state is JobState.QUEUED and not job.held and job.not_before <= self.now and not self.waits(job.id)
        ]
        return sorted(found, key=lambda job: (-job.priority, job.id))

    def pack(self, arms: int) -> list[int]:
        eligible = self.eligible()
        if not eligible:
            return []
        head = eligible[0]
        mates = [
            job.id
            for job in eligible[1:]
            if head.pack_key is not None and (job.pack_key, job.pack_id) == (head.pack_key, head.pack_id)
        ]
        return [head.id, *mates[: arms - 1]]

    def end_badly(self, job_id: int, state: JobState, **values) -> None:
        """Ended failed or cancelled: so do those that wait for it. By whom is checked apart."""
        self.change(job_id, state=state, token=None, held=False, **values)
        for later, earlier in self.after.items():
            if job_id in earlier and self.jobs[later].state is JobState.QUEUED:
                self.end_badly(later, JobState.CANCELLED, cancelled_by=job_id)

    def back(self, job_id: int, **values) -> None:
        """Back to the queue, unless a person wants it stopped."""
        if self.jobs[job_id].cancel_requested:
            values = {"not_before": 0.0, **values}
            values.pop("held", None)
            self.end_badly(job_id, JobState.CANCELLED, **values)
        else:
            self.change(job_id, **{"state": JobState.QUEUED, "token": None, "not_before": 0.0, "held": False, **values})


class QueueMachine(RuleBasedStateMachine):
    """See the head of the module. Made with a store whose clock is `clock`."""

    def __init__(self, store, clock, url) -> None:
        super().__init__()
        self.store, self.clock, self.url = store, clock, url
        self.model = Model()
        self.alive = set(WORKERS)
        self.made = 0

    @initialize()
    def begin(self) -> None:
        self.clock.empty()
        self.submit(2, "p", 0, JobKind.TRAIN, [])
        self.submit(1, "q", 0, JobKind.EVALUATE, [0])
        self.submit(1, None, 0, JobKind.PREDICT, [2])

    def token(self, number, zombie):
        """A token that was given out: mostly one that still speaks for its job."""
        given = [each for each in self.model.tries if zombie == 0 or self.model.tries[each].outcome is None]
        return self.some([number], given or list(self.model.tries))[0]

    def some(self, numbers, of):
        """The members of a list that numbers pick."""
        return sorted({of[number % len(of)] for number in numbers}) if of else []

    # What people do.

    @precondition(lambda self: len(self.model.jobs) < 9)
    @rule(
        count=st.integers(1, 2), key=st.sampled_from(["p", "q", None]), priority=st.integers(0, 1),
        kind=st.sampled_from([JobKind.TRAIN, JobKind.EVALUATE]), after=st.lists(pick, max_size=2),
    )  # fmt: skip
    def submit(self, count, key, priority, kind, after) -> None:
        earlier = self.some(after, sorted(self.model.jobs))
        new = [
            NewJob(
                kind=kind, experiment="e", spec_hash=f"s{self.made + number}", spec={}, pack_key=key,
                priority=priority, after=tuple(earlier),
            )
            for number in range(count)
        ]  # fmt: skip
        self.made += count
        bad = [each for each in earlier if self.model.jobs[each].state in BAD]
        for job in self.store.submit(new):
            self.model.jobs[job.id] = replace(job, state=JobState.QUEUED, error=None, cancelled_by=None)
            self.model.after[job.id] = set(earlier)
            if bad:
                self.model.end_badly(job.id, JobState.CANCELLED, cancelled_by=job.cancelled_by)

    @precondition(lambda self: self.model.jobs)
    @rule(numbers=st.lists(pick, min_size=1, max_size=2), running=st.booleans())
    def cancel(self, numbers, running) -> None:
        held = [job.id for job in self.model.jobs.values() if running and job.state in HELD]
        ids = self.some(numbers, held or sorted(self.model.jobs))
        queued = [each for each in ids if self.model.jobs[each].state is JobState.QUEUED]
        for job_id in ids:
            if job_id in queued and self.model.jobs[job_id].state is JobState.QUEUED:
                # One of those named may wait for another one; a person's wish comes first.
                self.model.change(job_id, state=JobState.CANCELLED, held=False)
            elif self.model.jobs[job_id].state in HELD:
                self.model.change(job_id, cancel_requested=True)
        for job_id in queued:
            self.model.end_badly(job_id, JobState.CANCELLED)
        assert [job.id for job in self.store.cancel(ids)] == ids

    @precondition(lambda self: any(job.state in BAD for job in self.model.jobs.values()))
    @rule(numbers=st.lists(pick, min_size=1, max_size=2))
    def retry(self, numbers) -> None:
        ids = self.some(numbers, sorted(self.model.jobs))
        wave, back = ids, []
        while wave:
            changed = [each for each in wave if self.model.jobs[each].state in BAD]
            causes = set(changed)
            for job_id in changed:
                self.model.change(
                    job_id, state=JobState.QUEUED, failures=0, preemptions=0, lost=0, error=None, held=False,
                    cancel_requested=False, pack_id=None, not_before=0.0, cancelled_by=None,
                )  # fmt: skip
            back += changed
            wave = [
                job.id
                for job in self.model.jobs.values()
                if job.state is JobState.CANCELLED
                and job.cancelled_by in causes
                and job.cancelled_by in self.model.after[job.id]
            ]
        in_vain = {each for job_id in back for each in self.model.after[job_id] if self.model.jobs[each].state in BAD}
        for cause in sorted(in_vain):
            self.model.end_badly(cause, self.model.jobs[cause].state)
        assert {job.id for job in self.store.retry(ids)} == {*ids, *back}

    @precondition(lambda self: any(job.held for job in self.model.jobs.values()))
    @rule(promoted=st.lists(pick, max_size=2), pruned=st.lists(pick, max_size=2))
    def settle(self, promoted, pruned) -> None:
        everything = sorted(self.model.jobs)
        prune = self.some(pruned, everything)
        promote = [each for each in self.some(promoted, everything) if each not in prune]
        held = {job.id for job in self.model.jobs.values() if job.held and job.state is JobState.QUEUED}
        changed = self.store.settle(promote, dict.fromkeys(prune, "worse"))
        assert {job.id for job in changed} == held & {*promote, *prune}
        for job_id in held & set(promote):
            self.model.change(job_id, held=False, not_before=0.0)
        for job_id in held & set(prune):
            self.model.change(job_id, state=JobState.CANCELLED, held=False, error="worse")
        for job_id in held & set(prune):
            self.model.end_badly(job_id, JobState.CANCELLED)

    # What workers do.

    @rule(number=pick, arms=st.integers(1, 3))
    def claim(self, number, arms) -> None:
        worker = WORKERS[number % len(WORKERS)]
        expected = self.model.pack(arms)
        claimed = self.store.claim(worker, lease=LEASE, max_arms=arms)
        assert [job.id for job in claimed] == expected
        assert len({job.pack_id for job in claimed}) <= 1
        for job in claimed:
            before = self.model.jobs[job.id]
            assert job.token not in self.model.tries, "a token is never used twice"
            assert before.pack_id in (None, job.pack_id)
            self.model.tries[job.token] = Try(job=job.id, worker=worker, lease_until=self.model.now + LEASE)
            self.model.change(
                job.id, state=JobState.RUNNING, token=job.token, pack_id=job.pack_id, attempts=before.attempts + 1
            )

    @precondition(lambda self: self.model.tries)
    @rule(number=pick, zombies=st.lists(pick, max_size=2), checkpoint=st.integers(0, 3))
    def beat(self, number, zombies, checkpoint) -> None:
        tokens = list(dict.fromkeys([self.token(number, 1), *self.some(zombies, list(self.model.tries))]))
        held = {token for token in tokens if self.model.tries[token].outcome is None}
        answer = self.store.beat(
            tokens, lease=LEASE, progress={token: {"checkpoint": checkpoint} for token in tokens[:2]}
        )
        assert answer.held == held
        for token in held:
            attempt = self.model.tries[token]
            attempt.lease_until = self.model.now + LEASE
            if token in tokens[:2] and checkpoint > self.model.jobs[attempt.job].checkpoint:
                self.model.change(attempt.job, checkpoint=checkpoint, lost=0)
        assert answer.cancelled == {
            token for token in held if self.model.jobs[self.model.tries[token].job].cancel_requested
        }

    @precondition(lambda self: self.model.tries)
    @rule(number=pick, zombie=st.integers(0, 3))
    def upload(self, number, zombie) -> None:
        token = self.token(number, zombie)
        attempt = self.model.tries[token]
        assert self.store.holds(token) == (attempt.outcome is None)
        assert self.store.uploading(token, {"by": token}) == (attempt.outcome is None)
        if attempt.outcome is None:
            self.model.change(attempt.job, state=JobState.UPLOADING, result={"by": token})

    @precondition(lambda self: self.model.tries)
    @rule(number=pick, zombie=st.integers(0, 3), outcome=st.sampled_from(ENDINGS))
    def finish(self, number, zombie, outcome) -> None:
        token = self.token(number, zombie)
        attempt = self.model.tries[token]
        told = self.store.finish(token, outcome, error="why" if outcome is Outcome.FAILED else None)
        if attempt.outcome is not None:
            assert told == (attempt.outcome is outcome)
            return
        assert told
        self._ended(attempt, outcome)

    @precondition(lambda self: self.model.tries)
    @rule(number=pick, outcome=st.sampled_from([Outcome.PREEMPTED, Outcome.FAILED]))
    def finish_together(self, number, outcome) -> None:
        """All that one worker holds, and one that it may have lost."""
        one = self.token(number, 0)
        mine = self.model.tries[one].worker
        tokens = {one} | {
            token for token, each in self.model.tries.items() if each.outcome is None and each.worker is mine
        }
        told = self.store.finish_together(tokens, outcome, error="why" if outcome is Outcome.FAILED else None)
        assert told == {token for token in tokens if self.model.tries[token].outcome in (None, outcome)}
        for token in tokens:
            if self.model.tries[token].outcome is None:
                self._ended(self.model.tries[token], outcome)

    def _ended(self, attempt, outcome) -> None:
        attempt.outcome = outcome
        job = self.model.jobs[attempt.job]
        match outcome:
            case Outcome.SUCCEEDED:
                self.model.change(job.id, state=JobState.SUCCEEDED, token=None, error=None)
            case Outcome.FATAL:
                self.model.end_badly(job.id, JobState.FAILED, failures=job.failures + 1)
            case Outcome.CANCELLED:
                self.model.end_badly(job.id, JobState.CANCELLED)
            case Outcome.PREEMPTED:
                self.model.back(job.id, preemptions=job.preemptions + 1, not_before=self.model.now)
            case Outcome.RETURNED:
                self.model.back(job.id, pack_id=None, not_before=self.model.now)
            case Outcome.PAUSED:
                self.model.back(job.id, pack_id=None, held=True)
            case Outcome.FAILED:
                failures = job.failures + 1
                if failures >= LIMITS.failures:
                    self.model.end_badly(job.id, JobState.FAILED, failures=failures, error="why")
                else:
                    wait = min(15.0, 10.0 * 2 ** (failures - 1))
                    self.model.back(job.id, failures=failures, error="why", not_before=self.model.now + wait)

    # What happens to them.

    @rule(number=pick)
    def crash(self, number) -> None:
        """The process of a worker dies, and another one on its host notices."""
        dead = WORKERS[number % len(WORKERS)]
        self._lose(
            lambda attempt: attempt.worker is dead or attempt.lease_until < self.model.now,
            host=dead.host,
            alive=[worker.pid for worker in WORKERS if worker is not dead],
        )

    @rule()
    def reclaim(self) -> None:
        self._lose(lambda attempt: attempt.lease_until < self.model.now)

    def _lose(self, gone, **where) -> None:
        lost = {token: each for token, each in self.model.tries.items() if each.outcome is None and gone(each)}
        returned = self.store.reclaim(**where)
        assert {job.id for job in returned} == {attempt.job for attempt in lost.values()}
        for attempt in lost.values():
            attempt.outcome = Outcome.LOST
            job = self.model.jobs[attempt.job]
            count = job.lost + 1
            poison = count >= LIMITS.lost and not job.cancel_requested
            error = "the worker was lost 3 times while it held this job" if poison else job.error
            self.model.change(job.id, lost=count, error=error)
            if job.cancel_requested:
                self.model.end_badly(job.id, JobState.CANCELLED)
            elif count >= LIMITS.lost:
                self.model.end_badly(job.id, JobState.FAILED)
            else:
                self.model.change(job.id, state=JobState.QUEUED, token=None)

    @rule(seconds=st.sampled_from([-3600.0, -20.0, 5.0, 20.0, 90.0, 3600.0]))
    def jump(self, seconds) -> None:
        """Time passes; or the clock was set, also back."""
        self.model.now += seconds
        self.clock.set(self.model.now)

    # What must hold.

    @invariant()
    def the_queue_is_as_the_model_says(self) -> None:
        stored = {job.id: job for job in self.store.jobs()}
        assert stored.keys() == self.model.jobs.keys()
        for job_id, job in stored.items():
            expected = self.model.jobs[job_id]
            if job.state is JobState.CANCELLED and job.cancelled_by is not None:
                # Of several that ended badly, any may be named.
                assert job.cancelled_by in self.model.after[job_id]
                assert self.model.jobs[job.cancelled_by].state in BAD
                assert job.error.startswith(f"job {job.cancelled_by} (")
                self.model.change(job_id, cancelled_by=job.cancelled_by, error=job.error)
                expected = self.model.jobs[job_id]
            assert replace(job, updated_at=0.0) == replace(expected, updated_at=0.0)

    def teardown(self) -> None:
        """Whatever has happened, nothing is stuck: with time, decisions and a worker, every job ends."""
        assert health.check(self.url).problems == ()
        for _ in range(2 + len(self.model.jobs) * 2):
            if all(job.ended for job in self.store.jobs()):
                return
            self.jump(3600.0)
            self.store.reclaim()
            self.store.settle([job.id for job in self.store.jobs() if job.held], {})
            for job in self.store.claim(WORKERS[0], lease=LEASE, max_arms=3):
                assert self.store.finish(job.token, Outcome.SUCCEEDED)
        left = [job for job in self.store.jobs() if job.state not in ENDED]
        assert not left, f"stuck: {left}"
