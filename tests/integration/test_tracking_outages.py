"""The tracking server is away at the start, for a minute, through the end: training goes on, and nothing is missed."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass

import pytest
from helpers.fault_table import record
from helpers.local_store import prepared_home

from rankwise.settings import Settings
from rankwise.tracking.query import get_run
from rankwise.tracking.server import serve
from rankwise.tracking.store import Store

pytestmark = pytest.mark.faults

# A step waits for a GPU, then writes what a step writes.
STEP_S = 0.02
STEPS = 1000
OUTAGE_S = 60.0
BACK_S = 180.0
KEYS = ("train.loss", "train.learning_rate", "train.grad_norm", "train.tokens_per_second")
MUST_HOLD = "training time +5 % at most; after replay exactly the right steps, no duplicate"


# What other processes do to a loop that only sleeps: a process of its own, in the same seconds on the same machine.
CONTROL = f"""
import json, select, sys, time
durations = []
while not select.select([sys.stdin], [], [], 0)[0]:
    began = time.perf_counter()
    time.sleep({STEP_S})
    durations.append(time.perf_counter() - began)
print(json.dumps(durations))
"""


@dataclass
class Took:
    """A training loop: its steps, how much longer one takes than without tracking, the share of time in writing."""

    steps: int
    more: float
    writing: float

    def check(self, fault, reference):
        """At most 5 % more than undisturbed; writing, where an outage would hold training up, is a part of it."""
        more = (1 + self.more) / (1 + reference.more) - 1
        assert more <= 0.05, f"{self}, undisturbed: {reference}"
        assert self.writing <= 0.05
        record(
            fault, MUST_HOLD, f"{self.steps:,} steps once each; {more:+.1%} time; {self.writing:.2%} of it in writing"
        )


def train(run, steps=STEPS, until=None):
    """A training loop; it ends after `steps`, or when `until` is over."""
    durations, writing, number = [], 0.0, 0
    control = subprocess.Popen(
        [sys.executable, "-c", CONTROL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while number < steps if until is None else time.monotonic() < until:
        began = time.perf_counter()
        time.sleep(STEP_S)
        ready = time.perf_counter()
        run.metrics(dict.fromkeys(KEYS, 1 / (number + 1)), number)
        ended = time.perf_counter()
        durations.append(ended - began)
        writing += ended - ready
        number += 1
    said, _ = control.communicate("stop\n")
    alone = typical(json.loads(said))
    return Took(steps=number, more=typical(durations) / alone - 1, writing=writing / sum(durations))


def typical(durations):
    """The mean without the slowest hundredth: single moments in which the machine did something else."""
    kept = sorted(durations)[: len(durations) - len(durations) // 100]
    return sum(kept) / len(kept)


def steps(store, run_id):
    """All points of all curves of a run, which must be the same steps for each, once."""
    curves = [[point.step for point in store.client.get_metric_history(run_id, key)] for key in KEYS]
    assert all(curve == curves[0] for curve in curves)
    assert len(set(curves[0])) == len(curves[0])
    return curves[0]


class Switch:
    """The server, on and off, always at one address."""

    def __init__(self, settings):
        self.settings, self.port, self._serving = settings, 0, None

    def on(self):
        self._serving = serve(self.settings, port=self.port)
        server = self._serving.__enter__()
        self.port = int(server.url.rpartition(":")[2])
        return server.url

    def off(self):
        if self._serving is not None:
            serving, self._serving = self._serving, None
            serving.__exit__(None, None, None)


@contextmanager
def meanwhile(work):
    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def test_an_outage_of_the_tracking_server_costs_no_time_and_no_point(tmp_path):
    switch = Switch(prepared_home(tmp_path / "server"))
    try:
        url = switch.on()
        settings = Settings.load({"RANKWISE_HOME": str(tmp_path / "client"), "MLFLOW_TRACKING_URI": url})
        with Store.open(settings, interval=1.0) as store:
            experiment = store.experiment("outages")
            runs = [store.start_run(experiment, name, status="SCHEDULED") for name in ("start", "minute", "end")]
            assert all(run.leave() for run in runs)
            undisturbed = store.start_run(experiment, "undisturbed", system_metrics=False)
            reference = train(undisturbed)
            assert undisturbed.end()
        at_start, for_a_minute, through_the_end = (run.run_id for run in runs)

        switch.off()
        with Store.open(settings, interval=1.0) as store:
            run = store.resume_run(at_start, system_metrics=False, attempt=1)
            with meanwhile(switch.on):
                took = train(run)
            assert run.end(timeout=BACK_S)
            assert steps(store, at_start) == list(range(STEPS))
            assert get_run(store.client, at_start).status == "FINISHED"
        took.check("tracking server down at the start", reference)

        def outage():
            time.sleep(5)
            switch.off()
            time.sleep(OUTAGE_S)
            switch.on()

        with Store.open(settings, interval=1.0) as store:
            run = store.resume_run(for_a_minute, system_metrics=False, attempt=1)
            with meanwhile(outage):
                took = train(run, until=time.monotonic() + OUTAGE_S + 10)
            assert run.end(timeout=BACK_S)
            assert steps(store, for_a_minute) == list(range(took.steps))
        took.check(f"tracking server down for {OUTAGE_S:.0f} s", reference)

        switch.off()
        with Store.open(settings, interval=1.0) as store:
            run = store.resume_run(through_the_end, system_metrics=False, attempt=1)
            took = train(run)
            assert not run.end(timeout=1.0)
            assert not store.close(timeout=1.0)
        switch.on()
        with Store.open(settings, interval=1.0) as store:
            report = store.sync(BACK_S)
            assert report.delivered == (through_the_end,)
            assert steps(store, through_the_end) == list(range(STEPS))
            assert get_run(store.client, through_the_end).status == "FINISHED"
            assert store.sync(1.0).delivered == ()
        took.check("tracking server down through the end", reference)
        assert list(settings.outbox.iterdir()) == []
    finally:
        switch.off()


def test_a_locked_database_of_the_local_store_costs_no_time_and_no_point(tmp_path):
    settings = prepared_home(tmp_path / "home")
    with Store.open(settings, interval=0.5) as store:
        experiment = store.experiment("locked")
        undisturbed = store.start_run(experiment, "undisturbed", system_metrics=False)
        reference = train(undisturbed, steps=STEPS // 2)
        assert undisturbed.end()
        run = store.start_run(experiment, "locked", system_metrics=False)
        assert run.drain(30)
        with closing(sqlite3.connect(settings.home / "mlflow.db")) as other:
            other.execute("BEGIN EXCLUSIVE")
            took = train(run, until=time.monotonic() + 20)
            other.rollback()
        assert run.end(timeout=BACK_S)
        assert steps(store, run.run_id) == list(range(took.steps))
    took.check("local MLflow database locked for 20 s", reference)


def test_an_artifact_store_that_is_away_at_the_end_is_waited_for(tmp_path):
    settings = prepared_home(tmp_path / "home")
    with Store.open(settings, interval=0.2) as store:
        run = store.start_run(store.experiment("artifacts"), "r=4", system_metrics=False)
        run.metric("train.loss", 1.0, 0)
        assert run.drain(30)
        settings.artifacts.rename(settings.home / "elsewhere")
        settings.artifacts.write_text("no directory")
        run.text("resolved", "experiment.yaml")
        run.metric("train.loss", 0.5, 1)
        began = time.monotonic()
        assert not run.end(timeout=2.0)
        settings.artifacts.unlink()
        (settings.home / "elsewhere").rename(settings.artifacts)
        assert store.sync(60).delivered == (run.run_id,)
        waited = time.monotonic() - began
        assert [info.path for info in store.client.list_artifacts(run.run_id)] == ["experiment.yaml"]
        assert [point.step for point in store.client.get_metric_history(run.run_id, "train.loss")] == [0, 1]
        assert get_run(store.client, run.run_id).status == "FINISHED"
    record(
        "artifact store down at the end (outbox)",
        "waits and retries; everything after it waits too",
        f"all delivered {waited:.1f} s after the end of the run",
    )
