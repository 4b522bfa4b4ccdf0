"""A sweep with an `answer` section from the command line: what is said before, after, and in MLflow."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers.project import make_project, write_rows
from mlflow import MlflowClient

SETTINGS = [
    "--set", "dataset.eval={split_from: train, rows: 30}", "--set", "evaluation.metrics=[loss]",
    "--set", "training.max_steps=4", "--set", "sweep.parameters={lora.r: [1, 4], seed: [0, 1, 2]}",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    project = make_project(tmp_path_factory.mktemp("answer"))
    write_rows(project.directory / "rows.jsonl", [{"a": n, "b": n % 5, "sum": n + n % 5} for n in range(90)])
    return project


@pytest.fixture(scope="module")
def finished(project):
    """The sweep with a margin that is far above the noise."""
    done = project.run("run", "tiny.yaml", "--json", *SETTINGS, "--set", "answer.margin=2")
    assert done.returncode == 0, done.stderr
    assert "no statement about ranks" not in done.stderr
    return json.loads(done.stdout)


def sweep_run(project):
    client = MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    return client, next(run for run in runs if run.data.tags["rankwise.kind"] == "sweep")


def test_the_answer_names_a_rank_in_every_form(project, finished, tmp_path):
    answer = finished["answer"]
    assert (answer["status"], answer["rank"], answer["margin"], answer["seeds"]) == ("enough", 1, 2, 3)
    assert answer["text"].startswith("r = 1 is enough: at ")
    assert answer["text"].endswith("(95 % confidence; 3 seeds, 30 rows; margin 2; learning rate 0.01).")
    assert [(each["r"], each["status"]) for each in answer["ranks"]] == [(1, "enough"), (4, "reference")]
    assert answer["ranks"][0]["difference"] < answer["limit"] < 2
    assert project.succeed("compare", "tiny").splitlines()[0] == answer["text"]
    page = tmp_path / "page.html"
    project.succeed("report", "tiny", "--output", str(page))
    assert "How much worse than r = 4?" in page.read_text()


def test_mlflow_has_the_plan_and_the_answer(project, finished):
    client, run = sweep_run(project)
    plan = json.loads(run.data.tags["rankwise.answer"])
    assert (plan["margin"], plan["confidence"], plan["seeds"]["looks"]) == (2, 0.95, [[0, 1, 2]])
    assert run.data.tags["rankwise.answer_status"] == "enough"
    assert run.data.tags["rankwise.answer_rank"] == "1"
    assert finished["answer"]["text"] == run.data.tags["rankwise.answer_text"]
    assert finished["answer"]["text"] in run.data.tags["mlflow.note.content"]
    assert "Margin of the answer: 2, at 95 % confidence." in run.data.tags["mlflow.note.content"]
    stored = json.loads(Path(client.download_artifacts(run.info.run_id, "comparison.json")).read_text())
    assert stored["answer"] == finished["answer"]


def test_another_margin_trains_nothing_and_is_said_to_be_chosen_afterwards(project, finished):
    done = project.run("run", "tiny.yaml", "--json", *SETTINGS, "--set", "answer.margin=1e-6")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stderr
    after = json.loads(done.stdout)["answer"]
    assert after["margin"] == 1e-6
    assert after["rank"] != 1
    assert "was changed once after the sweep was first submitted (before, the margin was 2)" in after["hint"]
    project.succeed("run", "tiny.yaml", *SETTINGS, "--set", "answer.margin=2")


def test_without_the_section_a_notice_comes_before_training_and_no_statement_after(project, finished):
    done = project.run("run", "tiny.yaml", "--json", *SETTINGS, "--set", "name=plain", "--set",
                       "sweep.parameters={lora.r: [1, 4]}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "one seed each, so there will be no statement about ranks: add `answer: {margin: 0.02}` to the definition"
        in done.stderr
    )
    answer = json.loads(done.stdout)["answer"]
    assert answer["text"].startswith("Two adapters, one seed each: no statement about ranks. Lowest loss: r = ")
    assert answer["ranks"] == []
    table = project.succeed("compare", "plain").splitlines()
    assert table[0] == answer["text"]
    assert "add `answer: {margin: 0.02}` to the definition" in table[1]


DEMAND = [*SETTINGS[:-2], "--set", "sweep.parameters={lora.r: [1, 4]}", "--set", "name=demand",
          "--set", "answer={margin: 1e-7, seeds: {first: 2, most: 4}}"]  # fmt: skip


@pytest.mark.faults
def test_a_sweep_that_is_killed_after_its_first_look_resumes_and_trains_nothing_twice(project):
    arguments = ["run", "tiny.yaml", *DEMAND, "--set", "training.max_steps=40", "--set", "training.save_steps=4"]
    process = subprocess.Popen(
        project.command(*arguments), cwd=project.directory, env=project.environment(), stderr=subprocess.PIPE, text=True
    )
    told = ""
    for line in process.stderr:
        told += line
        if "first look:" in line:
            process.kill()
            break
    process.communicate()
    assert "up to 4 if one is undecided (--no-more-seeds: never); now 4 arms of 40 steps; up to 16 share" in told
    assert "first look: Undecided: it is open whether r = 1 is enough" in told
    done = project.run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)["answer"]
    assert (answer["look"], answer["looks"], answer["seeds"]) == (2, 2, 4)
    jobs = json.loads(project.succeed("jobs", "list", "--experiment", "demand", "--kind", "train", "--json"))["jobs"]
    assert len(jobs) == 8
    assert {job["state"] for job in jobs} == {"succeeded"}
    assert [job["attempts"] for job in jobs[:4]] == [1, 1, 1, 1], "those of the first look"
    assert sum(job["failures"] for job in jobs) == 0
    assert "nothing to do: all 8 arms" in project.run(*arguments).stderr


def test_submit_and_a_worker_stop_after_the_first_look_on_request(project):
    arguments = ["tiny.yaml", *DEMAND, "--set", "name=queued", "--set", "seed=7"]
    project.succeed("submit", *arguments, "--no-more-seeds")
    project.succeed("worker", "--drain")
    shown = project.succeed("compare", "queued").splitlines()
    assert shown[0].startswith("Undecided: it is open whether r = 1 is enough")
    assert "`rankwise run` trains up to 4 seeds." in " ".join(shown[1:3])
    assert len(json.loads(project.succeed("compare", "queued", "--json"))["arms"]) == 4
    project.succeed("submit", *arguments)
    waiting = json.loads(project.succeed("compare", "queued", "--json"))
    assert "4 results of the last look, at 4 seeds, are still to come." in waiting["answer"]["hint"]
    project.succeed("worker", "--drain")
    assert json.loads(project.succeed("compare", "queued", "--json"))["answer"]["look"] == 2


def test_plan_and_validate_show_the_seeds(project):
    shown = project.succeed("plan", "tiny.yaml", *DEMAND, "--no-estimates")
    assert "tiny" not in shown
    assert "demand: 4 arms" in shown
    assert "First look at the ranks: seeds 0 to 1, 4 arms, 16 steps, of which up to 16 arms share one." in shown
    assert "If that leaves a rank undecided: seeds 2 to 3, 4 arms, 16 steps, of which up to 16 arms share one." in shown
    assert project.succeed("validate", "tiny.yaml", *DEMAND).endswith(
        ": valid: demand, 4 arms, and up to 4 with more seeds\n"
    )
