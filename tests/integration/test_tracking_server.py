"""Tracking against a real MLflow server on loopback: one request format, outages, killed writers."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
from helpers import warm
from helpers.local_store import prepared_home

from rankwise.exceptions import TrackingError
from rankwise.settings import Settings
from rankwise.tracking.connection import connect
from rankwise.tracking.query import get_run
from rankwise.tracking.server import serve
from rankwise.tracking.store import Store
from rankwise.tracking.values import DatasetRecord

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(TESTS)}

WRITER = """
import sys
from rankwise.settings import Settings
from rankwise.tracking.store import Store
store = Store.open(Settings.load({"RANKWISE_HOME": sys.argv[1], "MLFLOW_TRACKING_URI": sys.argv[2]}), interval=0.1)
run = store.start_run(store.experiment("killed"), "r=4", system_metrics=False)
for step in range(200):
    run.metric("train.loss", step / 3, step)
run.flush()
print(run.run_id, flush=True)
sys.stdin.readline()
for step in range(200, 400):
    run.metric("train.loss", step / 3, step)
run.text("late", "late.txt")
print("written", flush=True)
sys.stdin.readline()
"""

STARTER = """
import sys
from pathlib import Path
from helpers.local_store import local_settings
from rankwise.tracking.store import Store
with Store.open(local_settings(Path(sys.argv[1]))) as store:
    print(store.experiment("diamonds"))
"""


@pytest.fixture
def server_settings(tmp_path):
    return prepared_home(tmp_path / "server")


def client_settings(tmp_path, url):
    return Settings.load({"RANKWISE_HOME": str(tmp_path / "client"), "MLFLOW_TRACKING_URI": url})


def steps(store, run_id):
    return [metric.step for metric in store.client.get_metric_history(run_id, "train.loss")]


def test_points_of_a_living_and_of_a_killed_writer_survive_an_outage_once_each(tmp_path, server_settings, capsys):
    with serve(server_settings, port=0) as server:
        url = server.url
        store = Store.open(client_settings(tmp_path, url), interval=0.1)
        experiment = store.experiment("diamonds")
        run = store.start_run(experiment, "r=4", params={f"p{i}": i for i in range(150)}, system_metrics=False)
        writer = subprocess.Popen(
            [warm.python(), "-c", WRITER, str(store.settings.home), url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for step in range(1500):
            run.metrics({"train.loss": 1 / (step + 1), "train.grad_norm": float("inf")}, step)
        run.metric("train.odd", float("nan"), 0)
        run.flush()
        (odd,) = store.client.get_metric_history(run.run_id, "train.odd")
        assert odd.value != odd.value
        killed = writer.stdout.readline().strip()
    # The server is gone. Training goes on at its pace.
    began = time.perf_counter()
    for step in range(1500, 2000):
        run.metrics({"train.loss": 1 / (step + 1)}, step)
    run.table([{"id": "a", "text": "x"}], "predictions.json")
    run.input(DatasetRecord(name="d", digest="sha256:" + "a" * 64, source="x", source_type="local", context="train"))
    assert time.perf_counter() - began < 1
    writer.stdin.write("go\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "written\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    with serve(server_settings, port=int(url.rpartition(":")[2])):
        assert run.end(timeout=60)
        assert store.sync(60).delivered == (killed,)
        assert steps(store, run.run_id) == list(range(2000))
        assert steps(store, killed) == list(range(400))
        record = get_run(store.client, run.run_id)
        assert record.status == "FINISHED"
        assert len(record.params) == 150
        assert len(store.client.get_run(run.run_id).inputs.dataset_inputs) == 1
        assert len(store.client.load_table(experiment, "predictions.json", [run.run_id])) == 1
        assert get_run(store.client, killed).status == "RUNNING"
        assert [info.path for info in store.client.list_artifacts(killed)] == ["late.txt"]
        assert store.close()
    assert list(store.settings.outbox.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_processes_that_start_on_one_empty_home_all_get_the_store(tmp_path):
    command = [warm.python(), "-c", STARTER, str(tmp_path / "home")]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=300) for process in started]
    assert [(process.returncode, out, err) for process, (out, err) in zip(started, answers, strict=True)] == [
        (0, "1\n", "")
    ] * 2


def test_a_database_of_another_release_is_copied_before_it_is_upgraded(tmp_path):
    settings = prepared_home(tmp_path / "home")
    with closing(sqlite3.connect(settings.home / "mlflow.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'unheard'")
    with pytest.raises(TrackingError, match=r"upgrading .*mlflow.db failed: .*; the backup .* is .*\.bak"):
        connect(settings)
    (copy,) = settings.home.glob("mlflow.db.*.bak")
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("unheard",)
