"""The run of a claimed arm, where an earlier attempt was killed between making it and noting it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rankwise.exceptions import JobError
from rankwise.tasks.arm_run import open_run
from rankwise.tasks.session import ComputedArm, Session


class Took(SimpleNamespace):
    """A run that remembers what was done to it."""

    def __init__(self, run_id):
        super().__init__(run_id=run_id, written={}, acts=[])

    def tags(self, values):
        self.acts.append("tags")

    def params(self, values):
        self.written |= values

    def end(self, status, reason=None):
        self.acts.append(status)

    def leave(self, timeout):
        self.acts.append("left")


class Bench:
    def __init__(self, *, attempts, ghost=None, noted=None, ours=True):
        self.looked, self.set, self.run = [], [], None
        self.ghost, self.noted, self.ours = ghost, noted, ours
        self.job = SimpleNamespace(id=7, attempts=attempts, mlflow_run_id=None, token="t", title="job 7")
        work_arm = SimpleNamespace(params={"lora.r": 4}, spec_hash="a" * 64)
        work = SimpleNamespace(arm=work_arm, experiment_id="1", run_name="r=4", parent_run_id="p")
        self.arm = SimpleNamespace(job=self.job, work=work, done_steps=1)
        context = SimpleNamespace(store=self, queue=self, worker=SimpleNamespace(host="here"))
        self.holds = True
        self.session = Session(settings=None, reporter=None, emit=None)
        self.session.context = context
        self.session.fence = lambda job: lambda: self.holds

    def get(self, job_id):
        return SimpleNamespace(mlflow_run_id=self.noted if self.run is not None else None)

    def set_run(self, token, run_id):
        if isinstance(self.ours, Exception):
            raise self.ours
        self.set.append(run_id)
        return self.ours

    def find_running(self, *asked):
        self.looked.append(asked)
        return self.ghost

    def resume_run(self, run_id, **named):
        self.run = Took(run_id)
        return self.run

    def start_run(self, *values, **named):
        self.run = Took("new")
        self.named = named
        return self.run

    def open(self, monkeypatch):
        monkeypatch.setattr("rankwise.tasks.arm_run.arm_note", lambda arm: "")
        base = SimpleNamespace(
            device="cpu",
            dtype_reason="",
            attention=SimpleNamespace(reason="sdpa: as requested"),
            fingerprint=SimpleNamespace(digest=""),
        )
        return open_run(self.session, self.arm, base, SimpleNamespace(tags=dict))


def test_the_first_attempt_makes_a_run_and_asks_nobody(monkeypatch):
    bench = Bench(attempts=1, ghost="ghost")
    assert bench.open(monkeypatch).run_id == "new"
    assert (bench.looked, bench.set) == ([], ["new"])


def test_a_run_is_made_for_this_attempt_which_may_write_while_it_holds_the_job(monkeypatch):
    bench = Bench(attempts=1)
    bench.open(monkeypatch)
    assert bench.named["attempt"] == 1
    may_speak = bench.named["fence"]
    assert may_speak()
    bench.holds = False
    assert not may_speak()


def test_what_an_earlier_claim_has_computed_is_not_spoken_for(monkeypatch):
    bench = Bench(attempts=2, ghost="ghost")
    bench.session.computed[7] = ComputedArm(token="earlier", row={"steps": 3}, run=Took("ghost"))
    earlier = bench.session.computed[7].run
    assert bench.open(monkeypatch) is bench.run
    assert earlier.acts == ["left"]
    bench.session.computed[7] = ComputedArm(token="t", row={"steps": 3}, run=Took("ghost"))
    own = bench.session.computed[7].run
    assert bench.open(monkeypatch) is own
    assert (own.acts, bench.session.computed[7].run) == ([], None)


def test_a_later_attempt_goes_on_with_the_run_that_nobody_noted(monkeypatch):
    bench = Bench(attempts=2, ghost="ghost")
    assert bench.open(monkeypatch).run_id == "ghost"
    assert (bench.looked, bench.set) == ([("1", 7, "train")], ["ghost"])
    assert bench.run.written == {"lora.r": 4}


def test_a_later_attempt_makes_a_run_where_there_is_none(monkeypatch):
    bench = Bench(attempts=2)
    assert bench.open(monkeypatch).run_id == "new"


@pytest.mark.parametrize(("noted", "act"), [("new", "left"), ("other", "KILLED")])
def test_who_was_overtaken_ends_its_run_unless_that_is_gone_on_with(monkeypatch, noted, act):
    bench = Bench(attempts=1, noted=noted, ours=False)
    with pytest.raises(JobError, match="job 7 was taken over"):
        bench.open(monkeypatch)
    assert bench.run.acts == [act]
    bench.holds = False
    assert bench.named["fence"](), "nobody else knows of this run: its end is told"


def test_a_queue_that_is_away_leaves_the_run_to_the_next_attempt(monkeypatch):
    bench = Bench(attempts=1, ours=JobError("away"))
    with pytest.raises(JobError, match="away"):
        bench.open(monkeypatch)
    assert bench.run.acts == ["left"]
