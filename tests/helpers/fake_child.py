"""A child that is no process: a script answers each command with events, so that a worker's loop is tested alone."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from pathlib import Path

from rankwise.jobs.job import Outcome
from rankwise.reporter import SILENT, LineKind, Reporter
from rankwise.worker.child import ChildDiedError
from rankwise.worker.protocol import Result, ResultFiles

DONE = {"event": "done", "value": {}}
SETTLED = {"event": "done", "value": {"submitted": []}}
DIES = object()


class FakeChild:
    """A `rankwise.worker.child.Child`. `script(child, command)` yields events; `DIES` in place of one kills."""

    pid = 4711

    def __init__(self, script: Callable[[FakeChild, dict], Iterable], log: Path, *, dies_by: int = -9) -> None:
        self.script = script
        self.heard: list[dict] = []
        self.acts: list[str] = []
        self.log = log
        self.dies_by = dies_by
        self.death: ChildDiedError | None = None
        self.events: queue.SimpleQueue = queue.SimpleQueue()
        self.running = iter(())

    def commands(self, *names: str) -> list[dict]:
        return [message for message in self.heard if message["do"] in names]

    def send(self, message):
        self.heard.append(message)
        if message["do"] not in ("beat", "stop"):
            self.running = iter(self.script(self, message))

    def receive(self, timeout):
        if self.death is not None:
            raise self.death
        event = next(self.running, None)
        if event is DIES:
            self.death = ChildDiedError(self.dies_by, False)
            raise self.death
        return event

    def interrupt(self):
        self.acts.append("interrupt")
        self.death = ChildDiedError(-2, False)

    def stacks(self):
        self.acts.append("stacks")
        return self.log.with_suffix(".stacks")

    def kill(self):
        self.acts.append("kill")
        self.death = ChildDiedError(-9, False)

    def close(self):
        self.acts.append("close")


def reports(results: ResultFiles, job: dict, outcome: Outcome = Outcome.SUCCEEDED, **values) -> dict:
    """The event of a job's end, its file written first."""
    results.write(Result(token=job["token"], outcome=outcome, **values))
    return {"event": "result", "token": job["token"]}


class Listener(Reporter):
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def line(self, kind: LineKind, text: str) -> None:
        self.told.append((kind, text))

    def show(self, renderable) -> None:
        self.told.append(("show", str(renderable)))

    def task_with_remark(self, description, total, unit):
        return SILENT.task_with_remark(description, total, unit)

    def texts(self, kind: str) -> str:
        return "\n".join(text for each, text in self.told if each == kind)
