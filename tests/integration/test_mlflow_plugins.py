"""The two plugins through MLflow's own entry points: `mlflow run --backend rankwise`, and tags on runs in a worker."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import mlflow
import mlflow.projects
import pytest
from helpers.inline_worker import Listener, inline_worker
from helpers.local_store import local_settings
from helpers.project import Project, make_project
from helpers.workers import queue_of
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.loader import load_backend
from mlflow.tracking.context.registry import _run_context_provider_registry

from rankwise.jobs.job import JobKind, JobState
from rankwise.settings import Settings, current_work
from rankwise.tasks import commands
from rankwise.tasks.project_backend import RankwiseBackend
from rankwise.tracking.run_context import WorkerContext
from rankwise.worker.loop import LoopOptions


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(autouse=True)
def _store(project, monkeypatch):
    monkeypatch.setenv("RANKWISE_HOME", str(project.home))
    monkeypatch.setenv("RANKWISE_CACHE", str(project.directory / "cache"))
    monkeypatch.setattr("rankwise.tasks.project_backend._POLL_S", 0.1)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(Settings.load().tracking_uri)
    yield
    mlflow.set_tracking_uri(before)


def submitted(project: Project, **parameters: str):
    return mlflow.projects.run(
        str(project.directory),
        backend="rankwise",
        parameters={"experiment": "tiny.yaml", **parameters},
        synchronous=False,
    )


def test_mlflow_finds_the_backend_by_its_entry_point():
    assert isinstance(load_backend("rankwise"), RankwiseBackend)


def test_a_submitted_run_is_waited_for_while_a_worker_does_it(project):
    run = submitted(project, **{"training.max_steps": "2", "training.save_steps": "2"})
    assert run.get_status() == mlflow.entities.RunStatus.SCHEDULED
    with inline_worker(Settings.load(), Listener()) as loop:
        loop.work(LoopOptions(drain=True))
    assert run.get_status() == mlflow.entities.RunStatus.FINISHED
    assert run.wait()
    record = mlflow.MlflowClient().get_run(run.run_id)
    assert record.info.status == "FINISHED"
    assert record.data.tags["mlflow.project.backend"] == "rankwise"
    assert record.data.tags["rankwise.kind"] == "sweep"
    # Once more: nothing is left to do, and the same run is the answer.
    again = submitted(project, **{"training.max_steps": "2", "training.save_steps": "2"})
    assert again.run_id == run.run_id
    assert again.wait()


def test_a_submitted_run_can_be_cancelled(project):
    run = submitted(project, **{"training.max_steps": "3"})
    run.cancel()
    assert run.get_status() == mlflow.entities.RunStatus.KILLED
    with queue_of(project) as queue:
        mine = [job for job in queue.jobs() if job.spec.get("parent_run_id") == run.run_id]
    assert mine
    assert {job.state for job in mine} == {JobState.CANCELLED}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"parameters": {}}, "the parameter 'experiment' is missing; add -P experiment="),
        ({"parameters": {"experiment": "none.yaml"}}, "file not found"),
        ({"parameters": {"experiment": "tiny.yaml", "lora.rank": "4"}}, "did you mean"),
        (
            {"parameters": {"experiment": "tiny.yaml"}, "entry_point": "other"},
            "the only entry point",
        ),
        ({"parameters": {"experiment": "tiny.yaml"}, "backend_config": {"priority": "high"}}, "a whole number"),
    ],
)
def test_what_is_wrong_is_told_in_one_message(project, arguments, said):
    with pytest.raises(ExecutionException, match=said):
        mlflow.projects.run(str(project.directory), backend="rankwise", synchronous=False, **arguments)


@pytest.mark.proof
def test_the_command_line_of_mlflow_submits_without_an_mlproject_file(project):
    program = [sys.executable, "-m", "mlflow", "run", ".", "--backend", "rankwise", "-P", "experiment=tiny.yaml"]
    done = subprocess.run(
        [*program, "-P", "training.max_steps=5"],
        cwd=project.directory,
        env=project.environment({"MLFLOW_TRACKING_URI": Settings.load().tracking_uri}),
        capture_output=True,
        text=True,
        check=True,
    )
    run_id = re.search(r"=== Run \(ID '([0-9a-f]{32})'\) is queued: `rankwise worker` runs it", done.stderr)[1]
    assert mlflow.MlflowClient().get_run(run_id).info.status == "SCHEDULED"
    with queue_of(project) as queue:
        mine = [job for job in queue.jobs() if job.spec.get("parent_run_id") == run_id]
        assert len(mine) == 5
        queue.cancel([job.id for job in mine])


def test_a_run_that_a_users_code_starts_in_a_worker_has_job_attempt_and_worker(project, monkeypatch):
    run = submitted(project, **{"training.max_steps": "4"})
    started = []
    registered = [type(each) for each in _run_context_provider_registry]
    if WorkerContext not in registered:  # A process that was forked before the plugin was installed.
        _run_context_provider_registry.register(WorkerContext)
    real = commands.KINDS[JobKind.TRAIN]

    def train(session, jobs):
        with mlflow.start_run(run_name="mine") as mine:
            started.append((mine.info.run_id, jobs))
        real(session, jobs)

    monkeypatch.setattr(commands, "KINDS", {**commands.KINDS, JobKind.TRAIN: train})
    with inline_worker(Settings.load(), Listener()) as loop:
        loop.work(LoopOptions(drain=True))
    (run_id, jobs) = started[0]
    tags = mlflow.MlflowClient().get_run(run_id).data.tags
    assert tags["rankwise.job"] == ",".join(str(job.id) for job in jobs)
    assert tags["rankwise.attempt"] == ",".join("1" for _ in jobs)
    assert tags["rankwise.worker"].endswith(f":{os.getppid()}")
    assert run.wait()
    with mlflow.start_run() as outside:
        pass
    assert "rankwise.job" not in mlflow.MlflowClient().get_run(outside.info.run_id).data.tags


def test_a_program_that_a_job_starts_knows_the_job_by_mlflows_entry_point(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    program = "from mlflow.tracking.context.registry import resolve_tags; print(resolve_tags())"
    with current_work({"job": "7", "attempt": "2", "worker": "host:1"}):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    for tag in (
        "'rankwise.job': '7'",
        "'rankwise.attempt': '2'",
        "'rankwise.worker': 'host:1'",
        "'rankwise.device': '3'",
    ):
        assert tag in done.stdout


def test_a_variable_that_says_nonsense_is_no_context(monkeypatch):
    for text in ("no json", "[1]", "", "{}"):
        monkeypatch.setenv("RANKWISE_WORK", text)
        assert not WorkerContext().in_context()


def test_mlflows_own_default_store_is_left_for_rankwises(project, tmp_path, caplog, monkeypatch):
    mlflow.set_tracking_uri(local_settings(tmp_path / "other").tracking_uri)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # Where nothing is set, MLflow takes a file in the working directory.
    run = submitted(project, **{"training.max_steps": "3"})
    assert "set MLFLOW_TRACKING_URI" in caplog.text
    assert mlflow.MlflowClient().get_run(run.run_id).data.tags["mlflow.project.backend"] == "rankwise"
