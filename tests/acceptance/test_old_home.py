"""What 0.1.0 wrote still works: `tests/helpers/homes/0.1.0.tar.xz` is a home of that version, see `make.py` there.

Only the command line, `rankwise.flavor` and MLflow's own API are used.
"""

import json
import time

import pytest
from helpers import homes, warm
from helpers.homes.make import LOGITS, PREDICT, SWEEPS
from mlflow import MlflowClient

VERSION = "0.1.0"
STEPS = SWEEPS["paused"]["steps"]


class Home:
    """An unpacked home, and what its version printed and computed."""

    def __init__(self, directory):
        self.project, self.expected = homes.unpack(VERSION, directory)
        # The recorded source of the base is where the home was made.
        self.environment = {
            "RANKWISE_COMPUTE_DTYPE": "float32",
            "RANKWISE_BASES": str(directory),
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.uri = f"sqlite:///{self.project.home / 'mlflow.db'}"

    def run(self, *arguments, code=0):
        done = self.project.run(*arguments, env=self.environment)
        assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def json(self, *arguments):
        return json.loads(self.run(*arguments, "--json"))

    def log(self, job):
        return [json.loads(line) for line in self.run("jobs", "logs", str(job), "--json").splitlines()]

    def champion(self):
        return int(MlflowClient(self.uri).get_registered_model("tiny-adder").aliases["champion"])

    def answers(self, name):
        return [json.loads(line) for line in (self.project.directory / name).read_text().splitlines()]


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path)


def results(comparison):
    """What a comparison says apart from its words and paths."""
    return {
        "arms": [
            {key: arm[key] for key in ("spec_hash", "run_id", "status", "model_uri", "adapter", "metrics", "seconds")}
            for arm in comparison["arms"]
        ],
        "base": comparison["base"]["metrics"],
        "best": comparison["best"],
        "places": [(each["spec_hashes"], each["place"], each["mean"]) for each in comparison["configurations"]],
    }


def test_the_comparison_has_the_same_ranks_and_values(home):
    now = home.json("compare", "done")
    assert results(now) == results(home.expected["comparison"])
    assert len(now["arms"]) == 3


def test_adapters_load_by_alias_and_by_version_and_give_the_same_logits(home):
    wanted = home.expected["logits"]
    assert "models:/tiny-adder@best" in wanted
    environment = home.project.environment(home.environment)
    done = warm.run(["-c", LOGITS, home.uri, *wanted], cwd=home.project.directory, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for uri, rows in wanted.items():
        for row, now in zip(rows, found[uri], strict=True):
            assert now == pytest.approx(row, abs=1e-4), uri
    # A test that cannot tell adapters apart would show nothing.
    first, second = (wanted[uri][0] for uri in wanted)
    assert first != pytest.approx(second, abs=1e-2)


def test_predict_answers_as_it_did(home):
    home.run(*PREDICT, "again.jsonl")
    assert home.answers("again.jsonl") == home.expected["answers"]


def test_versions_are_promoted_and_rolled_back(home):
    assert home.champion() == 2
    assert home.json("rollback", "tiny-adder")["to"] == 1
    assert home.champion() == 1
    promoted = home.json("promote", "tiny-adder", "--candidate", "3")
    assert (promoted["champion"], promoted["passed"], promoted["moved"]) == ("models:/tiny-adder/1", True, True)
    # `overlap` reads what the training of version 3 recorded about its rows.
    assert {check["name"] for check in promoted["checks"]} == {"examples", "overlap", "chosen", "improvement"}
    assert home.champion() == 3
    assert home.json("rollback", "tiny-adder")["to"] == 1


def test_running_the_same_definition_does_nothing_anew(home):
    client = MlflowClient(home.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'done'")
    before = {run.info.run_id: run.info.end_time for run in client.search_runs([experiment.experiment_id])}
    again = home.json("run", "done.yaml")
    assert results(again) == results(home.expected["comparison"])
    assert home.json("jobs", "list")["jobs"] == home.expected["jobs"]
    assert {run.info.run_id: run.info.end_time for run in client.search_runs([experiment.experiment_id])} == before
    assert len(client.search_model_versions("name = 'tiny-adder'")) == 3


def test_queued_jobs_are_done_and_the_paused_arm_resumes(home):
    jobs = {job["id"]: job for job in home.expected["jobs"]}
    paused = next(job for job in jobs.values() if job["kind"] == "train" and job["preemptions"] == 1)
    waiting = {job["id"] for job in jobs.values() if job["state"] == "queued"}
    assert {jobs[number]["kind"] for number in waiting} == {"train", "evaluate", "predict"}
    began = int(time.time() * 1000)
    home.run("worker", "--drain")
    after = {job["id"]: job for job in home.json("jobs", "list")["jobs"]}
    assert {number: job["spec_hash"] for number, job in after.items()} == {
        number: job["spec_hash"] for number, job in jobs.items()
    }
    assert {job["state"] for job in after.values()} == {"succeeded"}
    # What was done before stays as it was; every other job took one attempt, the paused arm its second.
    assert {number: job["attempts"] - jobs[number]["attempts"] for number, job in after.items()} == {
        number: int(number in waiting) for number in jobs
    }
    points = MlflowClient(home.uri).get_metric_history(paused["run_id"], "train.loss")
    assert sorted(point.step for point in points) == list(range(1, STEPS + 1)), "every step once"
    assert max(point.step for point in points if point.timestamp < began) == home.expected["paused_at"]
    # Another engine began it, so it starts again, and the log says why.
    events = [line["event"] for line in home.log(paused["id"]) if line.get("attempt") == 2]
    assert any("so its arms start again: version 1 of the engine began them" in event for event in events), events
    for name, arms in (("paused", 1), ("queued", 2)):
        found = home.json("compare", name)["arms"]
        assert [arm["status"] for arm in found] == ["FINISHED"] * arms
        assert all(arm["metrics"]["eval.loss"]["n"] == 12 for arm in found)
    assert home.answers("queued-answers.jsonl") == home.expected["answers"]
