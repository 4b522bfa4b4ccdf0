"""`rankwise submit` and `rankwise worker`: a sweep that is planned in one place and done in another."""

import json

from helpers.project import make_project
from helpers.workers import processes, queue_of
from mlflow import MlflowClient


def test_a_run_on_a_machine_with_several_gpus_has_a_worker_for_each(tmp_path):
    project = make_project(tmp_path)
    # Their names are all that this needs: the CPU computes.
    settings = ["--set", "sweep.parameters={seed: [0, 1, 2, 3], lora.r: [2]}", "--set", "training.max_steps=40"]
    done = project.run("run", "tiny.yaml", *settings, "--max-arms", "1", "--json", env={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert done.returncode == 0, done.stderr
    assert {arm["status"] for arm in json.loads(done.stdout)["arms"]} == {"FINISHED"}
    with queue_of(project) as queue:
        attempts = [attempt for job in queue.jobs() for attempt in queue.attempts(job.id)]
        assert queue.workers() == []
    assert len({attempt.worker for attempt in attempts}) == 2
    assert {attempt.outcome for attempt in attempts} == {"succeeded"}
    assert "[1] " in done.stderr, "what the other worker says is shown, with its GPU"
    assert done.stderr.count("models:/tiny-adder@best is version") == 1, "one process finishes the sweep"
    assert not processes(project)


def test_what_was_submitted_is_planned_for_all_to_see_and_a_worker_does_all_of_it(tmp_path):
    project = make_project(tmp_path)
    submitted = json.loads(project.succeed("submit", "tiny.yaml", "--priority", "3", "--json"))["jobs"]
    assert [(job["kind"], job["state"]) for job in submitted] == [
        *[("train", "queued")] * 2,
        *[("evaluate", "queued")] * 3,
    ]
    client = MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny").experiment_id
    planned = {run.info.run_id: run for run in client.search_runs([experiment])}
    kinds = sorted((run.data.tags["rankwise.kind"], run.info.status) for run in planned.values())
    assert kinds == [("sweep", "SCHEDULED"), *[("train", "SCHEDULED")] * 2]
    assert {job["run_id"] for job in submitted if job["kind"] == "train"} < planned.keys()

    again = json.loads(project.succeed("submit", "tiny.yaml", "--no-preflight", "--json"))["jobs"]
    assert again == submitted
    assert {run.info.run_id for run in client.search_runs([experiment])} == planned.keys()

    done = project.run("worker", "--drain")
    assert done.returncode == 0, done.stderr
    assert "models:/tiny-adder@best is version" in done.stderr, "the last worker of a sweep reports on it"
    jobs = json.loads(project.succeed("jobs", "list", "--json"))["jobs"]
    assert {(job["state"], job["attempts"]) for job in jobs} == {("succeeded", 1)}
    runs = client.search_runs([experiment])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert planned.keys() < {run.info.run_id for run in runs}, "the planned runs were used"
    (sweep,) = [run for run in runs if run.data.tags["rankwise.kind"] == "sweep"]
    assert "comparison.json" in {artifact.path for artifact in client.list_artifacts(sweep.info.run_id)}
    assert not list((project.home / "checkpoints").iterdir())
    assert not list((project.home / "results").iterdir())
    assert not list((project.home / "logs" / "workers").iterdir()), "nothing went wrong, nothing is kept"

    # A worker that was killed after the last job, or met a server that was away, leaves a sweep open.
    def left_open():
        client.set_terminated(sweep.info.run_id, status="RUNNING")
        client.delete_registered_model_alias("tiny-adder", "best")
        assert "best" not in client.get_registered_model("tiny-adder").aliases

    def is_finished():
        assert client.get_run(sweep.info.run_id).info.status == "FINISHED"
        return "best" in client.get_registered_model("tiny-adder").aliases

    left_open()
    synced = json.loads(project.succeed("sync", "--json"))
    assert synced["finished"] == [sweep.info.run_id]
    assert is_finished()
    assert json.loads(project.succeed("sync", "--json"))["finished"] == []
    left_open()
    project.succeed(
        "submit", "tiny.yaml", "--set", "name=another", "--set", "seed=1", "--set", "sweep.parameters={lora.r: [2]}"
    )
    project.succeed("worker", "--drain")
    assert is_finished(), "whoever has work next makes up for it"
