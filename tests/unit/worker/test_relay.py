"""What a child says, and what its parent shows: both ends of the relay, the pipe between them left out."""

import logging
from contextlib import contextmanager

import pytest
from helpers.fake_child import Listener

from rankwise.logs import bound
from rankwise.worker.relay import Relay, RemoteLog, RemoteReporter


class Bars(Listener):
    def __init__(self):
        super().__init__()
        self.moved, self.noted_texts, self.open = 0, [], 0

    @contextmanager
    def task_with_remark(self, description, total, unit):
        self.told.append(("task", f"{description} of {total} {unit}"))
        self.open += 1

        def move(amount):
            self.moved += amount

        yield move, self.noted_texts.append
        self.open -= 1


@pytest.fixture
def ends():
    bars = Bars()
    relay = Relay(bars)
    return RemoteReporter(relay.handle, width=60, terminal=False), bars, relay


def test_words_arrive_as_they_were_meant(ends):
    reporter, bars, _ = ends
    for kind in ("say", "warn", "fail", "done"):
        getattr(reporter, kind)(f"{kind} [not markup]")
    reporter.show("drawn [bold]there[/bold]")
    assert bars.told == [
        *((kind, f"{kind} [not markup]") for kind in ("say", "warn", "fail", "done")),
        ("show", "drawn there"),
    ]


def test_movement_is_gathered_and_none_is_lost(ends):
    reporter, bars, _ = ends
    with reporter.task_with_remark("training", 1000, "steps") as (advance, note):
        for step in range(1000):
            advance(1)
            note(f"loss {step}")
        assert bars.open == 1
        assert bars.moved < 1000
    assert (bars.open, bars.moved, bars.noted_texts[-1]) == (0, 1000, "loss 999")


def test_bars_of_a_child_that_died_are_closed(ends):
    _, bars, relay = ends
    relay.handle({"event": "task", "id": 0, "description": "reading", "total": None, "unit": "B"})
    assert bars.open == 1
    relay.close_tasks()
    assert bars.open == 0


def test_events_about_jobs_are_left_to_others(ends):
    assert not ends[2].handle({"event": "result", "token": "t"})


def test_log_lines_of_a_child_are_logged_by_its_parent(ends, caplog):
    record = logging.makeLogRecord({"name": "rankwise.x", "levelno": logging.WARNING, "msg": "odd %s", "args": ("it",)})
    record.job = 7
    RemoteLog(ends[2].handle).handle(record)
    (logged,) = caplog.records
    assert (logged.name, logged.getMessage(), logged.job) == ("rankwise.x", "odd it", 7)
    with bound(arm="0123456789ab", step=3):
        RemoteLog(ends[2].handle).handle(record)
    assert (caplog.records[1].arm, caplog.records[1].step, caplog.records[1].job) == ("0123456789ab", 3, 7)
