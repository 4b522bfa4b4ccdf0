"""No definition causes a traceback, with any command that reads one: plan, submit, and what `run` does in its child.

Real stores, a real tiny base and its rows. Only the training itself is cut off: `train_pack` raises. Everything before
it (pins, rows, base, memory plan, runs) and after it (rungs, next rounds, the end of the sweep, comparison) is real.
`RANKWISE_FUZZ=200` tries so many accepted mutations of each kind of sweep.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict

import pytest
from helpers.inline_worker import Listener
from helpers.mutations import SWEEPS, load, mutations, written
from helpers.project import DEFINITION, make_project

from rankwise.cli.main import main
from rankwise.exceptions import JobError, RankwiseError
from rankwise.experiment.experiment import load_experiment
from rankwise.jobs.job import JobKind, Outcome, Worker
from rankwise.settings import Settings
from rankwise.tasks.commands import COMMANDS
from rankwise.tasks.context import failure_of
from rankwise.tasks.session import Session
from rankwise.worker.heartbeat import lease_clock

MOST = int(os.environ.get("RANKWISE_FUZZ", "4"))
WORKER = Worker(name="fuzz", host="here", pid=os.getpid())
FEW_TOKENS = 64
LEASE = 600.0
CUT_OFF = "the training is cut off"


class Child:
    """The session of a worker's child, in this process."""

    def __init__(self, settings):
        self.session = Session(settings=settings, reporter=Listener(), emit=lambda event: None)

    def close(self):
        self.session.serve(lambda: {"do": "quit"}, {})

    def call(self, command):
        """The value of a command, and the message of its failure; a failure without a message for people is raised."""
        try:
            return COMMANDS[command["do"]](self.session, command), None
        except Exception as error:
            failure = failure_of(error)
            if failure.trace is not None:
                raise
            return None, failure.text

    def run(self, experiment):
        """What `rankwise run` has its child do; whether an arm came as far as the training."""
        submission = {
            "do": "submit", "experiment": experiment.to_json(), "source": None, "overrides": [], "command": "run"
        }  # fmt: skip
        sweep, refused = self.call(submission)
        if refused:
            return False
        store = self.session.context.queue
        tried = False
        while jobs := store.claim(WORKER, lease=LEASE, max_arms=8, among=sweep["jobs"]):
            kind = jobs[0].kind
            self.session.claims.update({job.token: lease_clock() + LEASE for job in jobs}, [], [])
            if kind is JobKind.TRAIN or experiment.spec.evaluation.max_new_tokens <= FEW_TOKENS:
                _, failure = self.call({"do": str(kind), "jobs": [asdict(job) for job in jobs]})
                tried |= failure == CUT_OFF
            for job in jobs:
                store.finish(job.token, Outcome.FAILED, error=CUT_OFF)
            store.cancel([job.id for job in jobs])
        self.call({"do": "settle", "jobs": sweep["jobs"], "open": True, "complete": True, "watched": None})
        self.call({"do": "compare", "experiment": sweep["experiment"], "width": 200, "terminal": False})
        return tried


def run_in_child(experiment):
    child = Child(Settings.load())
    try:
        return child.run(experiment)
    finally:
        child.close()


def exit_code(*arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.parametrize("kind", SWEEPS)
def test_no_mutation_of_a_definition_causes_a_traceback(tmp_path, monkeypatch, capsys, kind):
    def cut_off(*arguments, **named):
        raise JobError(CUT_OFF)

    monkeypatch.setattr("rankwise.tasks.train.train_pack", cut_off)
    project = make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in project.environment().items():
        if name.startswith("RANKWISE_"):
            monkeypatch.setenv(name, value)
    data = load(DEFINITION.format(base="./base", rows="./rows.jsonl")) | {"sweep": SWEEPS[kind]}
    outcomes = Counter()
    for change, mutated in mutations(data, kind):
        if outcomes["accepted"] == MOST:
            break
        project.file.write_text(written(mutated))
        try:
            experiment = load_experiment(project.file)
        except RankwiseError:
            outcomes["refused"] += 1
            continue
        try:
            # In turn: the second of them would find the first one's jobs.
            planned = exit_code("plan", "tiny.yaml")
            tried = Child(Settings.load()).run(experiment) if outcomes["accepted"] % 2 else None
            submitted = exit_code("submit", "tiny.yaml")
        except Exception as error:
            raise AssertionError(f"{change} of the {kind} gives {type(error).__name__}: {error}") from error
        outcomes["accepted"] += 1
        outcomes["refused by plan"] += planned != 0
        outcomes["refused by submit"] += submitted != 0
        outcomes["run up to the training"] += bool(tried)
        outcomes["run"] += tried is not None
        assert {planned, submitted} <= {0, 1, 2, 3}, (change, capsys.readouterr().err)
    print(kind, dict(outcomes))
    assert outcomes["refused"] > MOST
    assert outcomes["run up to the training"] > 0
