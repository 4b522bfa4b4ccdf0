"""What a log gets where a terminal would show bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rankwise.cli import output as progress
from rankwise.cli.output import Bars


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_at_the_beginning_and_one_in_half_a_minute(clock):
    written = io.StringIO()
    with (
        Bars(Console(file=written, width=200)) as bars,
        bars.task_with_remark("training", 60, "steps") as (advance, note),
        bars.task_with_remark("pip download x", 2_500_000, "B") as (fetched, _),
        bars.task_with_remark("waiting", None, "jobs") as (waited, _),
    ):
        for clock[0] in (1.0, 29.0, 31.0, 60.0, 62.0):
            advance(10)
            note(f"loss {60 - clock[0]:.2f}")
        fetched(1_000_000)
        waited(1)
        clock[0] = 100.0
        advance(10)
    assert written.getvalue().splitlines() == [
        "training",
        "pip download x",
        "waiting",
        "training: 30 of 60 steps, loss 31.00",
        "training: 50 of 60 steps, loss 0.00",
        "pip download x: 1.00 MB of 2.50 MB",
        "waiting: 1 jobs",
    ]
