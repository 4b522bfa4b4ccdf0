"""What follows from jobs that have ended, as a child is told to do it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rankwise.jobs.job import JobState
from rankwise.tasks import commands


@pytest.mark.parametrize(("watched", "finished"), [(None, [1, 2]), ("mine", [2])])
def test_the_sweep_that_another_process_has_in_hand_is_left_to_it(monkeypatch, watched, finished):
    jobs = [
        SimpleNamespace(id=at, state=JobState.FAILED, spec={"parent_run_id": run})
        for at, run in ((1, "mine"), (2, "earlier"))
    ]
    told = []
    for name in ("settle_predictions", "settle_rungs", "submit_next_rounds"):
        monkeypatch.setattr(commands, name, lambda context, jobs: [])
    monkeypatch.setattr(commands, "finish_sweeps_of", lambda context, jobs: told.extend(job.id for job in jobs))
    context = SimpleNamespace(queue=SimpleNamespace(jobs=lambda ids: jobs))
    session = SimpleNamespace(context=context, compositions=[])
    commands.COMMANDS["settle"](
        session, {"do": "settle", "jobs": [1, 2], "complete": True, "watched": watched, "open": False}
    )
    assert told == finished
