from __future__ import annotations

import errno
import itertools
import threading
import time

import pytest
from helpers.waiting import until
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from rankwise.backoff import Backoff
from rankwise.exceptions import TrackingError
from rankwise.tracking import sender as module
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.sender import Sender, rest


class Server:
    """Stands for MLflow: takes batches, or fails as it is told."""

    def __init__(self):
        self.steps = []
        self.error = None
        self.bad = set()
        self.calls = 0
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, client, run_id, files, batch):
        self.calls += 1
        self.gate.wait(20)
        if self.error is not None:
            raise self.error
        if any(entry.record["s"] in self.bad for entry in batch.entries):
            raise MlflowException(f"bad value in {len(batch.entries)}", INVALID_PARAMETER_VALUE)
        self.steps += [(run_id, entry.record["s"]) for entry in batch.entries]


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def sender(server):
    made = Sender(lambda: None, interval=0.05, send=server)
    yield made
    server.error = None
    server.gate.set()
    made.close(5)


def make(tmp_path, sender, run_id="r1"):
    outbox = Outbox.create(tmp_path, run_id, "x")
    sender.add(outbox)
    return outbox


def put(outbox, steps):
    for step in steps:
        outbox.append({"m": {"loss": 1.0}, "s": step, "t": step})


def test_points_travel_in_batches_and_in_order(tmp_path, sender, server):
    sender._interval = 60  # Only a drain starts a delivery.
    outbox = make(tmp_path, sender)
    time.sleep(0.2)
    put(outbox, range(500))
    assert sender.drain(outbox, 10)
    assert server.steps == [("r1", step) for step in range(500)]
    assert server.calls <= 2
    assert sender.remove(outbox) == []
    assert list(tmp_path.iterdir()) == []


def test_an_outage_keeps_everything_and_the_end_of_it_delivers_all(tmp_path, sender, server, caplog):
    server.error = MlflowException("away", TEMPORARILY_UNAVAILABLE)
    outbox = make(tmp_path, sender)
    put(outbox, range(10))
    began = time.monotonic()
    assert not sender.drain(outbox, 0.3)
    assert time.monotonic() - began < 2
    assert "away" in sender.outage
    put(outbox, range(10, 20))
    server.error = None
    assert sender.drain(outbox, 10)
    assert server.steps == [("r1", step) for step in range(20)]
    assert sender.outage is None
    assert [record.message for record in caplog.records if record.name == module.__name__] == [
        "MLflow is unavailable; records are kept in the outbox until it recovers: away",
        "MLflow is available again",
    ]


def test_a_store_that_is_away_is_asked_ever_more_seldom(tmp_path, server):
    asked = []

    def away(*_):
        asked.append(time.monotonic())
        raise OSError("away")

    sender = Sender(lambda: None, interval=0.001, send=away, backoff=Backoff(0.05, 0.2))
    put(make(tmp_path, sender), [0])
    until(lambda: len(asked) > 4)
    sender.close(0)
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert all(gap > 0.9 * least for gap, least in zip(gaps, (0.05, 0.1, 0.2, 0.2), strict=False)), gaps


@pytest.mark.parametrize("error", [OSError("network"), KeyError("an artifact store's own error"), TimeoutError()])
def test_errors_of_any_library_are_waited_out(tmp_path, sender, server, error):
    server.error = error
    outbox = make(tmp_path, sender)
    put(outbox, [0])
    assert not sender.drain(outbox, 0.2)
    server.error = None
    assert sender.drain(outbox, 10)


def test_a_final_refusal_is_kept_reported_and_does_not_block_the_rest(tmp_path, sender, server):
    outbox = make(tmp_path, sender)
    server.error = MlflowException("bad value", INVALID_PARAMETER_VALUE)
    put(outbox, [0])
    assert sender.drain(outbox, 10)
    server.error = None
    put(outbox, [1])
    assert sender.drain(outbox, 10)
    assert server.steps == [("r1", 1)]
    assert sender.remove(outbox) == ["bad value"]
    assert '"s":0' in outbox.refused.read_text()


def test_a_bad_value_takes_nothing_along_that_went_into_the_same_request(tmp_path, sender, server):
    sender._interval = 60  # Only a drain starts a delivery.
    outbox = make(tmp_path, sender)
    time.sleep(0.2)
    server.bad = {3, 700}
    put(outbox, range(900))
    assert sender.drain(outbox, 10)
    assert sorted(step for _, step in server.steps) == [step for step in range(900) if step not in server.bad]
    assert server.calls < 40
    assert sender.remove(outbox) == ["bad value in 1"] * 2
    assert [line for line in outbox.refused.read_text().splitlines() if '"s":3,' in line or '"s":700,' in line]
    assert len(outbox.refused.read_text().splitlines()) == 2


def test_a_run_that_takes_nothing_is_not_asked_value_by_value(tmp_path, sender, server):
    sender._interval = 60
    outbox = make(tmp_path, sender)
    time.sleep(0.2)
    server.error = MlflowException("the run is deleted", INVALID_PARAMETER_VALUE)
    put(outbox, range(900))
    assert sender.drain(outbox, 10)
    assert server.calls <= 6
    assert set(sender.remove(outbox)) == {"the run is deleted"}
    assert len(outbox.refused.read_text().splitlines()) == 900


def test_a_damaged_line_is_set_aside(tmp_path, sender, server):
    outbox = make(tmp_path, sender)
    outbox.append({"unheard": 1})
    put(outbox, [1])
    assert sender.drain(outbox, 10)
    assert server.steps == [("r1", 1)]
    (refusal,) = sender.remove(outbox)
    assert "1 invalid lines" in refusal
    assert "it must be an object that starts with one of m, params" in refusal


def test_several_runs_are_delivered_side_by_side(tmp_path, sender, server):
    outboxes = [make(tmp_path, sender, f"r{number}") for number in range(4)]
    for outbox in outboxes:
        put(outbox, range(3))
    assert all(sender.drain(outbox, 10) for outbox in outboxes)
    assert sorted(server.steps) == [(f"r{number}", step) for number in range(4) for step in range(3)]


def test_what_is_left_at_the_close_stays_in_the_file(tmp_path, server):
    sender = Sender(lambda: None, interval=0.05, send=server)
    server.error = MlflowException("away", TEMPORARILY_UNAVAILABLE)
    outbox = make(tmp_path, sender)
    put(outbox, range(3))
    assert not sender.close(0.2)
    adopted = Outbox.adopt(outbox.path)
    assert [entry.record["s"] for entry in adopted.read()] == [0, 1, 2]
    adopted.close()


def test_an_outbox_that_is_removed_while_a_request_hangs_is_closed_by_its_end(tmp_path, sender, server, monkeypatch):
    server.gate.clear()
    outbox = make(tmp_path, sender)
    put(outbox, [0])
    while not server.calls:
        time.sleep(0.01)
    monkeypatch.setattr(module, "_REQUEST_GRACE_S", 0.1)
    sender.remove(outbox)
    assert outbox.path.exists()
    server.gate.set()
    deadline = time.monotonic() + 10
    while outbox.path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_end_the_thread(tmp_path, sender, server, monkeypatch):
    from rankwise.exceptions import StorageError

    outbox = make(tmp_path, sender)
    commit, failures = outbox.commit, []

    def full_once(offset):
        if not failures:
            failures.append(offset)
            raise StorageError("disk full")
        commit(offset)

    monkeypatch.setattr(outbox, "commit", full_once)
    put(outbox, [0])
    assert sender.drain(outbox, 10)
    assert server.steps == [("r1", 0), ("r1", 0)]  # Sent twice: MLflow keeps one row of it.


@pytest.mark.parametrize("what", ["read", "commit", "close"])
def test_a_disk_that_is_away_for_a_while_does_not_end_the_thread(tmp_path, sender, server, monkeypatch, what):
    outbox = make(tmp_path, sender)
    work, failures = getattr(outbox, what), []

    def away_once(*arguments):
        if not failures:
            failures.append(what)
            raise OSError(errno.ESTALE, "Stale file handle")
        return work(*arguments)

    monkeypatch.setattr(outbox, what, away_once)
    put(outbox, [0])
    sender.detach(outbox)
    other = make(tmp_path, sender, "r2")
    put(other, [1])
    assert sender.drain(other, 10)
    assert failures == [what]
    deadline = time.monotonic() + 10
    while ("r1", 0) not in server.steps and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ("r1", 0) in server.steps
    if what == "close":
        outbox.release()


def test_nothing_is_sent_for_a_writer_that_may_not_speak_any_more(tmp_path, sender, server, caplog):
    allowed = [True]
    outbox = Outbox.create(tmp_path, "r1", "x")
    sender.add(outbox, fence=lambda: allowed[0])
    put(outbox, [0])
    assert sender.drain(outbox, 10)
    allowed[0] = False
    put(outbox, [1])
    began = time.monotonic()
    assert not sender.drain(outbox, 60)
    assert time.monotonic() - began < 30, "nobody waits for what will not be sent"
    assert server.steps == [("r1", 0)]
    assert sender.remove(outbox) == []
    assert [entry.record["s"] for entry in Outbox.adopt(outbox.path).read()] == [1]
    assert "another one may have taken over" in caplog.text


def test_nothing_is_sent_while_nobody_knows_who_may_speak(tmp_path, sender, server):
    answers = [ConnectionError("the queue is away")]

    def fence():
        if answers:
            raise answers[0]
        return True

    outbox = Outbox.create(tmp_path, "r1", "x")
    sender.add(outbox, fence=fence)
    put(outbox, [0])
    assert not sender.drain(outbox, 0.3)
    assert "cannot check who may write to run r1: the queue is away" in sender.outage
    answers.clear()
    assert sender.drain(outbox, 10)
    assert server.steps == [("r1", 0)]


def test_an_outbox_that_was_left_goes_first_and_is_closed_when_it_is_empty(tmp_path, sender, server):
    left = Outbox.create(tmp_path, "r1", "x")
    put(left, [0, 1])
    left.close()
    sender._interval = 60
    sender.add(Outbox.adopt(left.path), orphaned=True)
    outbox = make(tmp_path, sender)
    put(outbox, [2])
    assert sender.drain(outbox, 10)
    assert server.steps == [("r1", 0), ("r1", 1), ("r1", 2)]
    assert not left.path.exists()


def test_a_store_that_cannot_be_opened_is_an_outage(tmp_path, server):
    clients = [TrackingError("the MLflow server does not answer")]

    def client():
        if clients:
            raise clients[0]

    sender = Sender(client, interval=0.05, send=server)
    outbox = make(tmp_path, sender)
    put(outbox, [0])
    assert not sender.drain(outbox, 0.3)
    assert sender.outage == "the MLflow server does not answer"
    clients.clear()
    assert sender.drain(outbox, 10)
    assert sender.close(5)


def test_a_detached_outbox_is_delivered_in_the_background_and_then_closed(tmp_path, sender, server):
    server.error = MlflowException("away", TEMPORARILY_UNAVAILABLE)
    outbox = make(tmp_path, sender)
    put(outbox, [0, 1])
    assert not sender.drain(outbox, 0.1)
    assert sender.detach(outbox) == []
    assert not outbox.closed
    server.error = None
    deadline = time.monotonic() + 10
    while outbox.path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.steps == [("r1", 0), ("r1", 1)]
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_behind_a_fence_can_be_taken_up_by_others(tmp_path, sender, server):
    left = Outbox.create(tmp_path, "r1", "x")
    put(left, [0])
    left.close()
    sender.add(Outbox.adopt(left.path), fence=lambda: False, orphaned=True)
    deadline = time.monotonic() + 10
    while (taken := Outbox.adopt(left.path)) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [entry.record["s"] for entry in taken.read()] == [0]
    assert server.steps == []
    taken.close()


def test_a_flood_of_ended_runs_does_not_hold_open_files_without_end(tmp_path, sender, server, monkeypatch):
    monkeypatch.setattr(module, "_MAX_BACKGROUND", 2)
    server.error = MlflowException("away", TEMPORARILY_UNAVAILABLE)
    outboxes = [make(tmp_path, sender, f"r{number}") for number in range(4)]
    for outbox in outboxes:
        put(outbox, [0])
    assert not sender.drain(outboxes[0], 0.3)
    for outbox in outboxes:
        sender.detach(outbox)
    assert [outbox.closed for outbox in outboxes] == [False, False, True, True]
    server.error = None
    deadline = time.monotonic() + 10
    while sender.orphans and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(server.steps) == [("r0", 0), ("r1", 0)]
    assert all(outbox.path.exists() for outbox in outboxes[2:])


def test_rounds_that_take_long_come_less_often_but_not_seldom():
    assert rest(10.0, 0.0) == 10.0
    assert rest(10.0, 0.064) == pytest.approx(19.2)
    assert rest(10.0, 30.0) == 60.0
