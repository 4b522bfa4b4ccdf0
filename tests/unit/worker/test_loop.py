import threading
import time
from dataclasses import replace

import pytest
from helpers.fake_child import DIES, DONE, SETTLED, FakeChild, Listener, reports

from rankwise.exceptions import JobStoreError, StorageError, TrackingError
from rankwise.jobs.job import JobKind, JobState, Limits, NewJob, Outcome, Worker
from rankwise.jobs.store import JobStore
from rankwise.worker.heartbeat import Stop, Timing, lease_clock
from rankwise.worker.loop import LoopOptions, WorkerLoop
from rankwise.worker.protocol import ResultFiles

ME = Worker(name="me", host="here", pid=1)
TIMING = Timing(
    lease=60.0, beat=0.02, watch=0.01, poll=0.01, reclaim=0.0, grace=60.0, upload=0.1, pause=0.01, longest_pause=0.02
)


def job(spec_hash, **changes):
    values = {"kind": JobKind.TRAIN, "experiment": "e", "spec_hash": spec_hash, "spec": {}, "pack_key": "p"}
    return NewJob(**{**values, **changes})


@pytest.fixture
def queue(tmp_path):
    limits = Limits(failures=3, backoff=0.01)
    store = JobStore(f"sqlite:///{tmp_path / 'q.db'}", lock=tmp_path / "lock", limits=limits)
    yield store
    store.close()


@pytest.fixture
def bench(queue, tmp_path, monkeypatch):
    """A worker whose children follow a script; pids on this host all live."""
    monkeypatch.setattr("psutil.pids", lambda: [1])
    return Bench(queue, tmp_path)


class Bench:
    def __init__(self, queue, directory):
        self.queue = queue
        self.results = ResultFiles(directory / "results")
        self.reporter = Listener()
        self.stop = Stop()
        self.children = []
        self.log = directory / "child.log"
        self.notes = []

    def work(self, script, plan=None, timing=TIMING, spawn=None):
        def start():
            self.children.append(FakeChild(script, self.log))
            return self.children[-1]

        with WorkerLoop(
            self.queue,
            worker=ME,
            spawn=spawn or start,
            results=self.results,
            reporter=self.reporter,
            stop=self.stop,
            timing=timing,
            note=lambda job, event, more: self.notes.append((job.id, job.attempts, event, more)),
        ) as loop:
            return loop.work(plan or LoopOptions(drain=True))

    def states(self):
        return {each.spec_hash: each.state for each in self.queue.jobs()}

    def packs(self, *names):
        return [
            [each["spec_hash"] for each in message["jobs"]]
            for child in self.children
            for message in child.commands(*(names or ("train",)))
        ]


def succeed(bench, settled=SETTLED):
    def script(child, command):
        if command["do"] == "settle":
            yield settled
            return
        for each in command["jobs"]:
            yield reports(bench.results, each, result={"by": each["spec_hash"]})
        yield DONE

    return script


def test_what_a_dead_child_has_written_goes_into_the_logs_of_its_jobs(bench):
    def script(child, command):
        if command["do"] == "settle":
            yield SETTLED
        elif command["jobs"][0]["attempts"] == 1:
            bench.log.write_text("Fatal Python error: Segmentation fault\n" + "at a.py\n" * 1000)
            yield reports(bench.results, command["jobs"][0], Outcome.FATAL, error="the loss is not finite")
            yield DIES
        else:
            yield from succeed(bench)(child, command)

    bench.queue.submit([job("a"), job("b")])
    bench.work(script)
    (finished, died) = bench.notes
    assert finished == (1, 1, "the loss is not finite", None)
    assert died[:2] == (2, 1)
    assert "was killed (SIGKILL)" in died[2]
    assert "\n" not in died[2]
    assert died[3].startswith("Fatal Python error"), "more than the row of the job has"
    assert bench.queue.get(2).state is JobState.SUCCEEDED


def test_a_pack_is_done_by_one_child_and_the_queue_is_told(bench):
    bench.queue.submit([job("a"), job("b"), job("x", pack_key="q")])
    bench.work(succeed(bench))
    assert bench.packs() == [["a", "b"], ["x"]]
    assert len(bench.children) == 1, "the child stays warm"
    assert bench.children[0].acts == ["close"]
    assert set(bench.states().values()) == {JobState.SUCCEEDED}
    assert bench.queue.get(1).result == {"by": "a"}
    assert not list((bench.log.parent / "results").iterdir())
    assert bench.queue.workers() == [], "the worker has retired"


def test_every_pack_is_followed_by_what_comes_of_it_and_new_jobs_join_those_watched(bench):
    first, other = bench.queue.submit([job("a"), job("other", pack_key="q")])

    def script(child, command):
        if command["do"] == "settle":
            new = bench.queue.submit([job("proposed")]) if command["jobs"] == [first.id] else []
            yield {"event": "done", "value": {"submitted": [each.id for each in new]}}
            return
        yield from succeed(bench)(child, command)

    jobs = bench.work(script, LoopOptions(among=frozenset([first.id])))
    assert jobs == {first.id, other.id + 1}
    assert bench.states() == {"a": "succeeded", "other": "queued", "proposed": "succeeded"}
    assert all(not each["complete"] for each in bench.children[0].commands("settle"))


def test_the_child_hears_of_its_claims_before_it_begins(bench):
    bench.queue.submit([job("a")])
    bench.work(succeed(bench))
    first, second, *_ = bench.children[0].heard
    assert (first["do"], second["do"]) == ("beat", "train")
    token = second["jobs"][0]["token"]
    assert lease_clock() + 50 < first["until"][token] <= lease_clock() + 60


def test_a_child_that_dies_costs_a_failure_and_the_others_are_tried_without_the_poison(bench):
    bench.queue.submit([job("good"), job("poison")])
    bench.log.write_text("Fatal Python error: Segmentation fault")

    def script(child, command):
        child.dies_by = -11
        if command["do"] == "train" and "poison" in [each["spec_hash"] for each in command["jobs"]]:
            yield DIES
        yield from succeed(bench)(child, command)

    bench.work(script)
    assert bench.states() == {"good": "succeeded", "poison": "failed"}
    assert bench.packs() == [["good", "poison"]] * 2 + [["good"], ["poison"]]
    said = bench.reporter.texts("fail")
    assert said.count("job 2 (train poison), retried in 0 s: the worker process crashed") == 2
    assert said.count("job 2 (train poison), not retried: the worker process crashed (SIGSEGV)") == 1
    error = bench.queue.get(2).error
    assert "crashed (SIGSEGV) during phase " in error
    assert error.endswith("Segmentation fault")


def test_what_a_child_left_on_disk_before_it_died_counts(bench):
    bench.queue.submit([job("a")])

    def script(child, command):
        if command["do"] == "train":
            reports(bench.results, command["jobs"][0])
            yield DIES
        yield SETTLED

    bench.work(script)
    assert bench.states() == {"a": "succeeded"}
    assert bench.queue.get(1).attempts == 1


def test_a_hung_child_is_killed_after_its_stacks_were_kept(bench):
    bench.queue.submit([job("a")])
    tries = []

    def script(child, command):
        if command["do"] == "train":
            tries.append(command)
            yield {"event": "phase", "name": "tokenize"}
            while len(tries) == 1:
                time.sleep(0.01)
                yield None
        yield from succeed(bench)(child, command)

    bench.work(script, timing=replace(TIMING, deadlines={"start": 10, "load": 10, "tokenize": 0.05}))
    assert bench.children[0].acts == ["stacks", "kill"]
    (first, second) = bench.queue.attempts(1)
    assert (first.outcome, second.outcome) == ("failed", "succeeded")
    assert "no message for 0 s during phase tokenize; its thread stacks are in" in first.error


def test_an_environment_at_fault_ends_what_is_watched_and_blames_no_job(bench):
    bench.queue.submit([job("a")])

    def script(child, command):
        yield {
            "event": "failed", "outcome": "preempted", "type": "StorageError", "text": "the disk is full",
            "environment": True, "trace": None,
        }  # fmt: skip

    with pytest.raises(StorageError, match="the disk is full"):
        bench.work(script, LoopOptions(drain=True, fail_on_outage=True))
    after = bench.queue.get(1)
    assert (after.state, after.failures, after.preemptions, after.error) == ("queued", 0, 1, "the disk is full")


def test_nobody_watches_a_worker_so_it_waits_for_the_environment(bench):
    bench.queue.submit([job("a")])
    tries = []

    def script(child, command):
        tries.append(command["do"])
        if len(tries) < 3:
            yield {
                "event": "failed", "outcome": "preempted", "type": "TrackingError", "text": "away",
                "environment": True, "trace": None,
            }  # fmt: skip
        yield from succeed(bench)(child, command)

    bench.work(script)
    assert bench.states() == {"a": "succeeded"}
    assert bench.queue.get(1).failures == 0
    assert "away; retrying in" in bench.reporter.texts("warn")


AWAY = {
    "event": "failed", "outcome": "preempted", "type": "TrackingError", "text": "away", "environment": True,
    "trace": None,
}  # fmt: skip


def test_what_follows_from_ended_jobs_is_tried_again_when_the_tracking_server_is_back(bench):
    bench.queue.submit([job("a"), job("b", pack_key="q")])
    settles = []

    def script(child, command):
        if command["do"] == "settle":
            settles.append((command["jobs"], command["open"]))
            yield AWAY if len(settles) < 5 else SETTLED
            return
        yield from succeed(bench)(child, command)

    bench.work(script, timing=replace(TIMING, upload=30.0))
    assert settles[0] == ([1], True)
    assert settles[4] == ([1, 2], True), "both, and what an earlier worker has left"
    assert len(settles) == 5, "and then it is done"
    assert bench.reporter.texts("warn").count("away") <= 2, "said when the jobs have ended, and not at every try"


def test_a_worker_that_is_to_end_does_not_wait_for_the_tracking_server_for_ever(bench):
    bench.queue.submit([job("a")])
    with pytest.raises(TrackingError, match=r"every job has ended, but sweeps lack .* `rankwise sync`"):
        bench.work(succeed(bench, settled=AWAY))
    assert bench.states() == {"a": "succeeded"}


def test_a_bug_in_what_follows_is_told_once_and_not_tried_again(bench):
    bench.queue.submit([job("a")])
    bug = {**AWAY, "type": "KeyError", "text": "'x'", "environment": False}
    bench.work(succeed(bench, settled=bug))
    assert len(bench.children[0].commands("settle")) == 1
    assert bench.reporter.texts("warn") == "after job 1 (train a): 'x'"


def test_the_first_wish_to_stop_is_passed_on_and_the_jobs_come_back(bench):
    bench.queue.submit([job("a"), job("later", pack_key="q")])

    def script(child, command):
        bench.stop.request()
        while not child.commands("stop"):
            yield None
        yield reports(bench.results, command["jobs"][0], Outcome.PREEMPTED)
        yield DONE

    bench.work(script)
    after = bench.queue.get(1)
    assert (after.state, after.preemptions, after.failures) == ("queued", 1, 0)
    assert bench.packs() == [["a"]], "nothing more is claimed, nothing is settled"
    assert bench.children[0].acts == ["close"]


def test_a_pack_that_is_stopped_goes_back_whole_whoever_waits_for_work(bench):
    bench.queue.submit([job("a"), job("b")])
    other, taken = replace(ME, name="other"), []

    def script(child, command):
        bench.stop.request()
        for each in command["jobs"]:
            yield reports(bench.results, each, Outcome.PREEMPTED)
            taken.extend(bench.queue.claim(other, lease=60, max_arms=16))
        yield DONE

    bench.work(script)
    assert taken == [], "half of a pack"
    again = bench.queue.claim(other, lease=60, max_arms=16)
    assert [(each.spec_hash, each.preemptions) for each in again] == [("a", 1), ("b", 1)]


@pytest.mark.parametrize("how", ["twice", "grace"])
def test_a_second_wish_or_the_end_of_the_grace_ends_the_child_at_once(bench, how):
    bench.queue.submit([job("a")])

    def script(child, command):
        bench.stop.request()
        if how == "twice":
            bench.stop.request()
        while True:
            time.sleep(0.01)
            yield None

    bench.work(script, timing=replace(TIMING, grace=0.05 if how == "grace" else 60.0))
    assert bench.children[0].acts == ["interrupt"]
    after = bench.queue.get(1)
    assert (after.state, after.preemptions, after.failures, after.error) == ("queued", 1, 0, None)


def test_a_wish_to_cancel_reaches_the_child_between_two_heartbeats(bench):
    bench.queue.submit([job("a")])
    began = time.monotonic()

    def script(child, command):
        bench.queue.cancel([1])
        while not any(message["cancelled"] for message in child.commands("beat")):
            assert time.monotonic() - began < 5
            time.sleep(0.01)
            yield None
        yield reports(bench.results, command["jobs"][0], Outcome.CANCELLED)
        yield DONE if command["do"] == "train" else SETTLED

    def whole(child, command):
        return script(child, command) if command["do"] == "train" else [SETTLED]

    bench.work(whole, timing=replace(TIMING, beat=100.0))
    assert bench.states() == {"a": "cancelled"}


def test_what_another_worker_has_taken_over_is_not_finished(bench):
    bench.queue.submit([job("a")])
    other = Worker(name="other", host="there", pid=2)

    def script(child, command):
        if command["do"] == "train":
            bench.queue.reclaim(host=ME.host)
            (again,) = bench.queue.claim(other, lease=60)
            while not any(message["lost"] for message in child.commands("beat")):
                time.sleep(0.01)
                yield None
            yield reports(bench.results, command["jobs"][0], result={"by": "zombie"})
            assert bench.queue.get(1).token == again.token
            assert bench.queue.finish(again.token, Outcome.SUCCEEDED, result={"by": "owner"})
            yield DONE
        yield SETTLED

    bench.work(script)
    assert bench.queue.get(1).result == {"by": "owner"}
    assert "taken over by another worker; this attempt is discarded" in bench.reporter.texts("warn")


def test_an_outage_of_the_queue_shorter_than_the_lease_costs_nothing(bench, monkeypatch):
    bench.queue.submit([job("a")])
    real, calls = bench.queue.finish, []

    def finish(*arguments, **named):
        calls.append(arguments)
        if len(calls) < 3:
            raise JobStoreError("away")
        return real(*arguments, **named)

    monkeypatch.setattr(bench.queue, "finish", finish)
    monkeypatch.setattr("rankwise.worker.job_runner._RETRY_S", 0.01)
    bench.work(succeed(bench))
    assert bench.states() == {"a": "succeeded"}
    assert len(calls) == 3


def test_what_was_claimed_just_before_an_outage_is_done(bench, monkeypatch):
    bench.queue.announce(Worker(name="second", host="there", pid=3), {})
    bench.queue.submit([job("a"), job("b")])
    looks = []

    def away():
        looks.append(None)
        bench.stop.request()  # Nothing else would end a loop whose claim nobody does.
        raise JobStoreError("away")

    def script(child, command):
        for each in command["jobs"]:
            yield reports(bench.results, each)
        yield DONE

    monkeypatch.setattr(bench.queue, "workers", away)
    bench.work(script)
    assert len(looks) == 1
    assert bench.states() == {"a": "succeeded", "b": "succeeded"}


def test_a_disk_too_full_to_start_a_child_is_waited_for(bench):
    bench.queue.submit([job("a")])
    starts = []

    def spawn():
        starts.append(None)
        if len(starts) == 1:
            raise StorageError("the disk is full")
        return FakeChild(succeed(bench), bench.log)

    bench.work(succeed(bench), spawn=spawn)
    after = bench.queue.get(1)
    assert (after.state, after.failures, after.lost) == ("succeeded", 0, 0)
    assert "the disk is full; retrying in" in bench.reporter.texts("warn")


def test_what_waits_for_the_tracking_server_is_held_and_published_later_without_training(bench):
    bench.queue.submit([job("a"), job("other", pack_key="q")])
    publishing = []

    def script(child, command):
        if command["do"] == "train" and command["jobs"][0]["spec_hash"] == "a":
            bench.queue.uploading(command["jobs"][0]["token"], {"steps": 3})
            yield {"event": "waiting", "token": command["jobs"][0]["token"], "reason": "no server"}
            yield DONE
        if command["do"] == "publish":
            publishing.append(bench.queue.get(1).state)
            if len(publishing) == 1:
                yield {"event": "waiting", "token": command["jobs"][0]["token"], "reason": "no server"}
                yield DONE
        yield from succeed(bench)(child, command)

    bench.work(script, timing=replace(TIMING, upload=10))
    assert publishing == ["uploading", "uploading"]
    assert bench.packs() == [["a"], ["other"]]
    assert set(bench.states().values()) == {"succeeded"}
    assert bench.queue.get(1).attempts == 1


def test_what_waits_over_two_bases_is_published_base_by_base(bench):
    bench.queue.submit([job("a"), job("other", pack_key="q"), job("b")])

    def script(child, command):
        if command["do"] == "train":
            for each in command["jobs"]:
                yield {"event": "waiting", "token": each["token"], "reason": "no server"}
            yield DONE
        yield from succeed(bench)(child, command)

    bench.work(script, timing=replace(TIMING, upload=10))
    assert bench.packs("publish") == [["a", "b"], ["other"]]
    assert set(bench.states().values()) == {"succeeded"}


def test_a_worker_that_would_end_gives_up_on_the_server_after_a_while(bench):
    bench.queue.submit([job("a")])

    def script(child, command):
        if command["do"] == "settle":
            yield SETTLED
            return
        yield {"event": "waiting", "token": command["jobs"][0]["token"], "reason": "no server"}
        yield DONE

    with pytest.raises(TrackingError, match="publishes them without training"):
        bench.work(script)
    after = bench.queue.get(1)
    assert (after.state, after.failures, after.preemptions) == ("queued", 0, 1)


def test_arms_that_do_not_fit_are_claimed_again_after_the_others(bench):
    bench.queue.submit([job("a"), job("b"), job("c")])

    def script(child, command):
        if command["do"] == "train" and len(command["jobs"]) > 2:
            for each in command["jobs"][2:]:
                yield reports(bench.results, each, Outcome.RETURNED)
            for each in command["jobs"][:2]:
                yield reports(bench.results, each)
            yield DONE
        yield from succeed(bench)(child, command)

    bench.work(script)
    assert bench.packs() == [["a", "b", "c"], ["c"]]
    assert bench.queue.get(3).preemptions == 0


def test_held_jobs_without_mates_are_settled_by_whoever_is_idle(bench):
    bench.queue.submit([job("a")])

    def script(child, command):
        if command["do"] == "settle":
            held = [each.id for each in bench.queue.jobs() if each.held]
            if len(child.commands("settle")) > 1:
                bench.queue.settle(held, {})
            yield SETTLED
            return
        (each,) = command["jobs"]
        outcome = Outcome.SUCCEEDED if each["result"] else Outcome.PAUSED
        yield reports(bench.results, each, outcome, result={"steps": 4})
        yield DONE

    bench.work(script)
    assert bench.states() == {"a": "succeeded"}
    assert bench.packs() == [["a"], ["a"]]


@pytest.mark.parametrize("plan", [LoopOptions(drain=True), LoopOptions()])
def test_a_lost_decision_is_made_although_evaluations_wait_for_it(bench, plan):
    (train,) = bench.queue.submit([job("a")])
    bench.queue.submit([job("b", kind=JobKind.EVALUATE, after=(train.id,))])
    (claimed,) = bench.queue.claim(replace(ME, name="dead"), lease=60, kinds=[JobKind.TRAIN])
    bench.queue.finish(claimed.token, Outcome.PAUSED, result={"steps": 4})

    def script(child, command):
        if command["do"] == "settle":
            if command["jobs"] == [train.id]:
                bench.queue.settle([train.id], {})
            if set(bench.states().values()) == {JobState.SUCCEEDED}:
                bench.stop.request()
            yield SETTLED
            return
        yield from succeed(bench)(child, command)

    bench.work(script, plan)
    assert bench.states() == {"a": "succeeded", "b": "succeeded"}


def test_a_run_goes_on_with_what_another_worker_has_proposed(bench):
    """The last job of a round ends elsewhere, and its worker submits the next round."""
    (first,) = bench.queue.submit([job("a")])
    (elsewhere,) = bench.queue.claim(replace(ME, name="other"), lease=60)
    proposed = []

    def other_worker():
        bench.queue.finish(elsewhere.token, Outcome.SUCCEEDED)

    def script(child, command):
        if command["do"] == "settle":
            if not proposed:
                proposed.extend(bench.queue.submit([job("b")]))
            yield {"event": "done", "value": {"submitted": [first.id, *(each.id for each in proposed)]}}
            return
        yield from succeed(bench)(child, command)

    thread = threading.Timer(0.3, other_worker)
    thread.start()
    jobs = bench.work(script, LoopOptions(among=frozenset([first.id])))
    thread.join()
    assert jobs == {first.id, proposed[0].id}
    assert bench.states() == {"a": "succeeded", "b": "succeeded"}


def test_a_run_goes_on_although_another_worker_ended_the_last_job_while_what_follows_was_decided(bench):
    first, second = bench.queue.submit([job("a"), job("b", pack_key="q")])
    (elsewhere,) = bench.queue.claim(replace(ME, name="other"), lease=60, among=[second.id])
    proposed = []

    def script(child, command):
        if command["do"] == "settle":
            if len(child.commands("settle")) == 1:
                bench.queue.finish(elsewhere.token, Outcome.SUCCEEDED)
            elif not proposed:
                proposed.extend(bench.queue.submit([job("c")]))
            yield {"event": "done", "value": {"submitted": [each.id for each in proposed]}}
            return
        yield from succeed(bench)(child, command)

    jobs = bench.work(script, LoopOptions(among=frozenset([first.id, second.id])))
    assert jobs == {first.id, second.id, *(each.id for each in proposed)}
    assert bench.states() == {"a": "succeeded", "b": "succeeded", "c": "succeeded"}
    assert len(bench.children[0].commands("settle")) == 3, "what nobody else has changed is not settled again"


def test_a_worker_beside_a_run_finishes_all_sweeps_but_the_one_of_that_run(bench):
    bench.queue.submit([job("a")])

    def script(child, command):
        if command["do"] == "settle":
            bench.stop.request()
            yield SETTLED
            return
        yield from succeed(bench)(child, command)

    bench.work(script, LoopOptions(experiment="e", watched="run-1"))
    (settled,) = bench.children[0].commands("settle")
    assert (settled["complete"], settled["watched"]) == (True, "run-1")


def test_two_workers_share_what_waits(bench):
    bench.queue.announce(Worker(name="second", host="there", pid=3), {})
    bench.queue.submit([job(str(number)) for number in range(6)])
    bench.work(succeed(bench))
    assert [len(pack) for pack in bench.packs()] == [3, 2, 1]


def test_a_pack_that_was_cut_off_stays_whole_however_many_workers_there_are(bench):
    bench.queue.announce(Worker(name="second", host="there", pid=3), {})
    bench.queue.submit([job("a"), job("b")])
    for each in bench.queue.claim(ME, lease=60, max_arms=2):
        bench.queue.finish(each.token, Outcome.PREEMPTED)
    bench.work(succeed(bench))
    assert bench.packs() == [["a", "b"]]


def test_workers_that_died_on_this_host_are_not_shared_with(bench):
    bench.queue.announce(Worker(name="dead", host=ME.host, pid=2), {})
    bench.queue.submit([job("a"), job("b")])
    bench.work(succeed(bench))
    assert bench.packs() == [["a", "b"]]


def test_a_worker_that_is_not_drained_waits_for_more(bench):
    thread = threading.Timer(0.2, lambda: bench.queue.submit([job("late")]))

    def script(child, command):
        if command["do"] == "settle":
            bench.stop.request()
            yield SETTLED
            return
        yield from succeed(bench)(child, command)

    thread.start()
    bench.work(script, LoopOptions())
    assert bench.states() == {"late": "succeeded"}
