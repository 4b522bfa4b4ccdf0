"""The run of a prediction, where the tracking server fails half way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rankwise.exceptions import JobError, TrackingError
from rankwise.tasks.predict import record_prediction

RESULT = {"rows": 1, "failed": 0, "completion_tokens": 3, "sha256": "sha256:0"}


class OpenRun:
    """Takes everything, and fails to deliver it."""

    run_id = "run-1"

    def __init__(self, error):
        self.error = error
        self.ends = []

    def input(self, record):
        pass

    metrics = tags = json = lambda self, *values: None

    def flush(self):
        raise self.error

    def end(self, status, reason=None, timeout=60.0):
        self.ends.append((status, reason))

    def leave(self, timeout):
        self.ends.append(("left", None))


def record(run, run_id="run-1", ours=True):
    warned = []
    store = SimpleNamespace(
        resume_run=lambda *_, **__: run, start_run=lambda *_, **__: run, experiment=lambda name: "1"
    )
    queue = SimpleNamespace(set_run=lambda token, run_id: ours)
    session = SimpleNamespace(
        context=SimpleNamespace(store=store, queue=queue),
        reporter=SimpleNamespace(warn=warned.append),
        fence=lambda job: lambda: True,
    )
    manifest = SimpleNamespace(request={"input": "sha256:1"}, rows=1, models={}, to_json=dict)
    prediction = SimpleNamespace(manifest=manifest, source=Path("rows.jsonl"), output=Path("out.jsonl"))
    job = SimpleNamespace(id=7, token="t", title="job 7", mlflow_run_id=run_id, attempts=2)
    return record_prediction(session, job, prediction, RESULT), warned


def test_a_server_that_goes_away_leaves_no_run_open():
    run = OpenRun(TrackingError("away"))
    run_id, warned = record(run)
    assert run_id == "run-1"
    assert run.ends == [("FINISHED", "the run lacks part of the prediction: away")]
    assert warned == ["out.jsonl is complete, but its MLflow run is not: away"]


def test_another_error_lets_go_of_the_run_for_the_next_attempt():
    run = OpenRun(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        record(run)
    assert run.ends == [("left", None)]


def test_a_prediction_that_another_worker_has_now_is_shown_by_that_one_alone():
    run = OpenRun(None)
    with pytest.raises(JobError, match="job 7 was taken over by another worker"):
        record(run, run_id=None, ours=False)
    assert run.ends == [("KILLED", "another worker has taken over this prediction")]
