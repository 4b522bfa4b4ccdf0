"""A sweep that waits: MLflow has runs of the arms that are claimed first, `compare` shows the others from the queue."""

from __future__ import annotations

import pytest
from helpers import inline_worker as inline
from helpers.inline_worker import Listener, inline_worker
from helpers.project import make_project

from rankwise.cli.jobs import open_queue
from rankwise.jobs.job import JobKind, Outcome, Worker
from rankwise.settings import Settings
from rankwise.tasks import submit as enqueue
from rankwise.tracking.store import Store


@pytest.fixture
def settings(tmp_path, monkeypatch):
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / "mlruns"))
    monkeypatch.setattr(enqueue, "_SCHEDULED_AHEAD", 2)
    return Settings.load()


def ask(settings, *commands):
    with inline_worker(settings, Listener()) as loop:
        return [loop.call(command) for command in commands]


def submission(ranks):
    definition = (Settings.load().home.parent / "tiny.yaml").read_text().replace("[2, 4]", str(ranks))
    return inline.submission(definition, "rankwise run tiny.yaml")


COMPARE = {"do": "compare", "experiment": "tiny", "width": 200, "terminal": False}


def arms(compared):
    return {arm["params"]["lora.r"]: (arm["status"], arm["reason"], arm["run_id"]) for arm in compared["json"]["arms"]}


def scheduled(settings):
    with Store.open(settings) as store:
        return store.find_scheduled(store.find_experiment("tiny"))


def test_arms_without_a_run_are_shown_as_the_queue_has_them(settings):
    ask(settings, submission([2, 4, 8, 16]))
    runs = scheduled(settings)
    assert len(runs) == 2, "a run for each of those that are claimed first"
    _, compared = ask(settings, submission([2, 4, 8, 16]), COMPARE)
    assert scheduled(settings) == runs, "the same again makes no more runs while those wait"
    shown = arms(compared)
    assert list(shown) == [2, 4, 8, 16]
    assert {status for status, _, _ in shown.values()} == {"SCHEDULED"}
    assert [run_id for _, _, run_id in shown.values()] == [*runs.values(), None, None]
    kinds = [{key: type(value) for key, value in arm["params"].items()} for arm in compared["json"]["arms"]]
    assert kinds[0] == kinds[3], "one configuration is one, whoever tells of it"

    with open_queue(settings) as queue:
        jobs = queue.jobs(kinds=[JobKind.TRAIN])
        queue.cancel([jobs[2].id])
        for job in (jobs[1], jobs[3]):
            (claimed,) = queue.claim(Worker(name="w", host="h", pid=1), lease=60, among=[job.id])
            queue.finish(claimed.token, Outcome.FATAL, error="the rows are not there")
    ended, _, other = ask(settings, COMPARE, submission([2, 32]), COMPARE)
    shown = arms(ended)
    assert shown[4] == ("FAILED", "the rows are not there", list(runs.values())[1]), "its run has not begun"
    assert shown[8][0] == "KILLED"
    assert shown[16] == ("FAILED", "the rows are not there", None)
    assert len(other["json"]["arms"]) == 2, "arms that the sweep submitted last does not have are left out"
