"""Worker processes of a project, for tests that kill, stop and watch them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from helpers import warm
from helpers.project import Project, make_project
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import JobStore

TESTS = Path(__file__).parents[1]


class Process:
    """One command that runs beside the test; what it says goes into a file."""

    def __init__(self, project: Project, *arguments: str, module: str = "rankwise", **env: str) -> None:
        self.project = project
        self._file = project.directory / f"said-{time.time_ns()}"
        with self._file.open("w") as file:
            self.popen = subprocess.Popen(
                [warm.python(), "-m", module, *arguments],
                cwd=project.directory,
                env=project.environment({"PYTHONPATH": str(TESTS), **env}),
                stdout=file,
                stderr=file,
            )

    @property
    def said(self) -> str:
        return self._file.read_text()

    def wait(self, timeout: float = 300) -> int:
        try:
            return self.popen.wait(timeout)
        finally:
            if self.popen.returncode is None:
                print(self.said)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


@contextmanager
def queue_of(project: Project) -> Iterator[JobStore]:
    store = JobStore(f"sqlite:///{project.home / 'rankwise.db'}", lock=project.home / "queue.lock")
    try:
        yield store
    finally:
        store.close()


def processes(project: Project) -> dict[int, psutil.Process]:
    """All that run in the project's directory: workers, their children, and the programs that stand for warm ones."""
    return {process.pid: process for process, directory in _working_directories() if directory == project.directory}


def end_processes(directory: Path) -> None:
    """Kill every process that runs in a directory or below it."""
    for process, working_directory in _working_directories():
        if working_directory.is_relative_to(directory) and process.pid != os.getpid():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _working_directories() -> Iterator[tuple[psutil.Process, Path]]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            directory = Path(os.readlink(f"/proc/{process.pid}/cwd"))
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process, directory


def send(project: Project, number: signal.Signals) -> None:
    """A signal to all processes of a project."""
    for process in processes(project).values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def saved_steps(project: Project) -> list[int]:
    """Steps of the checkpoints that are whole."""
    found = (project.home / "checkpoints").glob("*/step-*/manifest.json")
    return sorted(int(path.parent.name.removeprefix("step-")) for path in found)


def told_steps(project: Project) -> dict[str, int]:
    """By run: the last step that a process has put into the outbox before it ended."""
    found: dict[str, int] = {}
    for path in (project.home / "outbox").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            if '"train.loss"' in line and line.endswith("}"):
                run = path.name.partition(".")[0]
                found[run] = max(found.get(run, 0), json.loads(line)["s"])
    return found


def starts(project: Project, job: Job) -> dict[int, int]:
    """By attempt: the step from which the arm resumed, from its log, without attempts that started from scratch."""
    found = {}
    pattern = re.compile(rf"arm {job.spec_hash[:12]} resumes from step (\d+) of")
    for line in (project.home / "logs" / "jobs" / f"{job.id}.log").read_text().splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if match := pattern.search(entry["event"]):
                found[entry["attempt"]] = int(match[1])
    return found


def adapters(project: Project) -> dict[str, bytes]:
    """The registered adapter of every arm, by spec hash."""
    with queue_of(project) as queue:
        jobs = queue.jobs(kinds=[JobKind.TRAIN], limit=1000)
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}
    found = {}
    for job in jobs:
        (path,) = (project.home / "artifacts").rglob(f"{job.result['model_id']}/**/adapter_model.safetensors")
        found[job.spec_hash] = path.read_bytes()
    return found


def submitted(
    directory: Path, seeds: Sequence[int], steps: int, saved: int, env: Mapping[str, str] | None = None
) -> Project:
    """A project with two arms for each seed in the queue, which save a checkpoint every `saved` steps."""
    project = make_project(directory)
    settings = ["--set", f"training.max_steps={steps}", "--set", f"training.save_steps={saved}"]
    sweep = f"sweep.parameters={{seed: {list(seeds)}, lora.r: [2, 4]}}"
    project.succeed("submit", "tiny.yaml", *settings, "--set", sweep, env=env)
    return project


def at_rest(project: Project, steps: int, tracking_uri: str | None = None) -> None:
    """Every job has succeeded, each train job has one version, and its run has every step once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri or f"sqlite:///{project.home / 'mlflow.db'}")
    with queue_of(project) as queue:
        jobs = queue.jobs(limit=1000)
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}, [(job.id, job.state, job.error) for job in jobs]
    trains = [job for job in jobs if job.kind is JobKind.TRAIN]
    versions = client.search_model_versions("name = 'tiny-adder'")
    assert sorted(version.tags["rankwise.job"] for version in versions) == sorted(str(job.id) for job in trains)
    for job in trains:
        points = client.get_metric_history(job.mlflow_run_id, "train.loss")
        assert sorted(point.step for point in points) == list(range(1, steps + 1)), job.id
        assert client.get_run(job.mlflow_run_id).info.status == "FINISHED"
