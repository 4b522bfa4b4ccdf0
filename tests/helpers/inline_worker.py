"""A worker's loop whose child is a thread of the test: the real commands over real stores, without another import."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.experiment.experiment import parse_experiment
from rankwise.jobs.job import Worker
from rankwise.jobs.store import JobStore
from rankwise.reporter import LineKind, Reporter
from rankwise.settings import Settings
from rankwise.tasks.commands import COMMANDS
from rankwise.tasks.session import Claims, Session
from rankwise.worker.heartbeat import Stop, Timing
from rankwise.worker.loop import LoopOptions, WorkerLoop
from rankwise.worker.protocol import ResultFiles
from rankwise.worker.relay import RemoteReporter

QUICK = Timing(beat=0.2, poll=0.05, watch=0.05, pause=0.5)


class InlineChild:
    """A `rankwise.worker.child.Child` that serves in a thread."""

    pid = os.getpid()

    def __init__(self, settings: Settings) -> None:
        self.log = settings.home / "child.log"
        self.commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.claims = Claims()
        self.stop = threading.Event()
        reporter = RemoteReporter(self.events.put, width=200, terminal=False)
        session = Session(
            settings=settings, reporter=reporter, emit=self.events.put, stop=self.stop, claims=self.claims
        )
        self.thread = threading.Thread(target=session.serve, args=(self.commands.get, COMMANDS), daemon=True)
        self.thread.start()

    def send(self, message: dict[str, Any]) -> None:
        match message["do"]:
            case "beat":
                self.claims.update(message["until"], message["lost"], message["cancelled"])
            case "stop":
                self.stop.set()
            case _:
                self.commands.put(message)

    def receive(self, timeout: float) -> dict[str, Any] | None:
        try:
            return self.events.get(timeout=timeout)
        except queue.Empty:
            return None

    def interrupt(self) -> None:
        raise AssertionError("nobody interrupts in these tests")

    def stacks(self) -> Path | None:
        return None

    def kill(self) -> None:
        raise AssertionError("a thread cannot be killed")

    def close(self) -> None:
        self.commands.put({"do": "quit"})
        self.thread.join(60)


class Listener(Reporter):
    """A reporter that remembers the lines."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def line(self, kind: LineKind, text: str) -> None:
        self.told.append(text)

    def show(self, renderable: Any) -> None:
        pass

    @contextmanager
    def task_with_remark(self, description: str, total: int | None, unit: str) -> Iterator[Any]:
        yield (lambda amount: None), (lambda text: None)


@contextmanager
def inline_worker(settings: Settings, reporter: Any) -> Iterator[WorkerLoop]:
    store = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    with WorkerLoop(
        store,
        worker=Worker(name="inline", host="here", pid=os.getpid()),
        spawn=lambda: InlineChild(settings),
        results=ResultFiles(settings.home / "results"),
        reporter=reporter,
        stop=Stop(),
        timing=QUICK,
    ) as loop:
        yield loop
    store.close()


def submission(definition: str, command: str = "run") -> dict[str, Any]:
    """The command to submit the text of a definition, as `rankwise run` gives it to its child."""
    experiment = parse_experiment(definition, "x.yaml").to_json()
    return {"do": "submit", "experiment": experiment, "source": None, "overrides": [], "command": command}


def run_inline(settings: Settings, definition: str, *, max_arms: int = 16) -> tuple[dict[str, Any], list[str]]:
    """What `rankwise run` does with the text of a definition: the comparison, and what was told."""
    reporter = Listener()
    with inline_worker(settings, reporter) as loop:
        sweep = loop.call(submission(definition))
        if sweep["jobs"]:
            jobs = loop.work(LoopOptions(among=frozenset(sweep["jobs"]), max_arms=max_arms, fail_on_outage=True))
            loop.call({**sweep, "do": "finish", "jobs": sorted(jobs), "command": "run"})
        compared = loop.call({"do": "compare", "experiment": sweep["experiment"], "width": 200, "terminal": False})
    return compared["json"], reporter.told
