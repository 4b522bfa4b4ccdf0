"""`rankwise run` on a tiny base, as a user runs it."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.project import make_project, sums, write_rows
from mlflow import MlflowClient

import rankwise.flavor


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose sweep has run; the tests of this module read it."""
    project = make_project(tmp_path_factory.mktemp("run"), fresh=True)
    comparison = json.loads(project.succeed("run", "tiny.yaml", "--json"))
    return project, comparison


@pytest.fixture(scope="module")
def client(finished):
    return MlflowClient(f"sqlite:///{finished[0].home / 'mlflow.db'}")


def test_the_comparison_has_every_arm_with_its_results(finished):
    _, comparison = finished
    assert comparison["experiment"] == "tiny"
    assert comparison["primary_metric"] == {"name": "eval.loss", "greater_is_better": False}
    assert [arm["params"]["lora.r"] for arm in comparison["arms"]] == [2, 4]
    assert [arm["params"]["lora.alpha"] for arm in comparison["arms"]] == [4, 8]
    for arm in comparison["arms"]:
        assert arm["status"] == "FINISHED"
        assert re.fullmatch(r"models:/tiny-adder/\d+", arm["model_uri"])
        assert arm["metrics"]["eval.loss"]["n"] == 12
        assert arm["metrics"]["eval.loss"]["stderr"] > 0
        assert arm["metrics"]["eval.loss"]["value"] < comparison["base"]["metrics"]["eval.loss"]["value"]
        # q_proj 64 -> 64 and v_proj 64 -> 32 in two layers
        assert arm["adapter"]["parameters"] == 2 * arm["params"]["lora.r"] * ((64 + 64) + (64 + 32))
        assert arm["adapter"]["bytes"] > 4 * arm["adapter"]["parameters"]
        assert arm["seconds"] > 0
        assert arm["peak_memory_bytes"] > 1e8
    losses = {arm["spec_hash"]: arm["metrics"]["eval.loss"]["value"] for arm in comparison["arms"]}
    assert comparison["best"] == min(losses, key=losses.get)


def test_running_again_trains_and_evaluates_nothing(finished, client):
    project, comparison = finished
    experiment = client.get_experiment_by_name("tiny").experiment_id
    before = {run.info.run_id: run.info.end_time for run in client.search_runs([experiment])}
    again = project.run("run", "tiny.yaml", "--json")
    assert again.returncode == 0
    assert "nothing to do: all 2 arms are trained and evaluated" in again.stderr
    assert json.loads(again.stdout) == comparison
    assert {run.info.run_id: run.info.end_time for run in client.search_runs([experiment])} == before
    assert len(client.search_model_versions("name = 'tiny-adder'")) == 2


def test_mlflow_shows_a_sweep_its_arms_and_the_base(finished, client):
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    kinds = sorted(run.data.tags["rankwise.kind"] for run in runs)
    assert kinds == ["base", "sweep", "train", "train"]
    parent = next(run for run in runs if run.data.tags["rankwise.kind"] == "sweep")
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs if run is not parent)
    assert {run.info.status for run in runs} == {"FINISHED"}
    names = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert {"comparison.json", "report.html", "experiment.yaml", "data", "plots"} <= names
    arm = next(run for run in runs if run.data.tags["rankwise.kind"] == "train")
    headline = finished[1]["answer"]["text"]
    assert headline.startswith("Two adapters, one seed each: no statement about ranks. Lowest loss: r = ")
    report = Path(client.download_artifacts(parent.info.run_id, "report.html")).read_text()
    for wanted in (headline, "effective rank by layer", "training loss", f"runs/{arm.info.run_id}"):
        assert wanted in report
    assert parent.data.tags["rankwise.answer_status"] == "no_statement"
    assert parent.data.tags["rankwise.answer_text"] == headline
    note = parent.data.tags["mlflow.note.content"]
    assert headline in note
    assert f"](#/experiments/{experiment.experiment_id}/runs/{arm.info.run_id})" in note
    assert {"adapter.effective_rank", "adapter.rank_99"} <= arm.data.metrics.keys()
    page = Path(client.download_artifacts(arm.info.run_id, "anatomy.html")).read_text()
    assert f"lora_A {arm.data.params['lora.r']} x 64" in page
    assert "base here, measured" in page
    assert {"lora.r", "lora.alpha", "lora.dropout", "training.learning_rate", "seed"} <= arm.data.params.keys()
    assert {"train.loss", "train.grad_norm", "train.tokens_per_second", "eval.loss", "eval.exact_match"} <= (
        arm.data.metrics.keys()
    )
    assert [point.step for point in client.get_metric_history(arm.info.run_id, "train.loss")] == [1, 2, 3, 4, 5, 6]
    inputs = {tag.value for used in arm.inputs.dataset_inputs for tag in used.tags if tag.key == "mlflow.data.context"}
    assert inputs == {"train", "eval"}
    assert "LoRA r =" in arm.data.tags["mlflow.note.content"]


def test_the_best_arm_has_the_alias_and_loads_by_it(finished, client, monkeypatch):
    project, comparison = finished
    best = next(arm for arm in comparison["arms"] if arm["spec_hash"] == comparison["best"])
    version = client.get_model_version_by_alias("tiny-adder", "best")
    assert f"models:/tiny-adder/{version.version}" == best["model_uri"]
    assert version.tags["lora.r"] == str(best["params"]["lora.r"])
    assert float(version.tags["eval.loss"]) == pytest.approx(best["metrics"]["eval.loss"]["value"])
    monkeypatch.setenv("RANKWISE_HOME", str(project.home))
    monkeypatch.setenv("RANKWISE_CACHE", str(project.directory / "cache"))
    monkeypatch.chdir(project.directory)
    adapter = rankwise.flavor.load_model("models:/tiny-adder@best", tracking_uri=client.tracking_uri)
    assert adapter.metadata.lora["r"] == best["params"]["lora.r"]


def test_compare_lists_the_arms_by_rank(finished):
    project, comparison = finished
    assert json.loads(project.succeed("compare", "tiny", "--json")) == comparison
    table = project.succeed("compare", "tiny")
    lines = table.splitlines()
    assert [line.split()[:3] for line in lines if " kB" in line] == [["2", "2", "4"], ["★", "1", "4"]]
    assert any(line.split()[:1] == ["base"] for line in lines)


def test_jobs_list_says_what_was_done(finished):
    jobs = json.loads(finished[0].succeed("jobs", "list", "--json"))["jobs"]
    assert (
        sorted((job["kind"], job["state"]) for job in jobs)
        == [("evaluate", "succeeded")] * 3 + [("train", "succeeded")] * 2
    )
    assert all(job["attempts"] == 1 and job["failures"] == 0 for job in jobs)


def test_pull_gives_a_peft_directory(finished, tmp_path):
    finished[0].succeed("pull", "models:/tiny-adder@best", str(tmp_path / "deep" / "adapter"))
    names = {path.name for path in (tmp_path / "deep" / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_an_extended_sweep_trains_only_what_is_missing(tmp_path):
    project = make_project(tmp_path)
    first = json.loads(project.succeed("run", "tiny.yaml", "--json", "--set", "sweep.parameters={lora.r: [2]}"))
    project.succeed("run", "tiny.yaml")
    jobs = json.loads(project.succeed("jobs", "list", "--json"))["jobs"]
    assert [job["attempts"] for job in jobs] == [1] * 5
    comparison = json.loads(project.succeed("compare", "tiny", "--json"))
    assert comparison["arms"][0] == first["arms"][0]
    assert len(comparison["arms"]) == 2

    # Under another name: what is trained already is linked, and only evaluated rows decide whether it is measured anew.
    renamed = project.run("run", "tiny.yaml", "--json", "--set", "name=other")
    assert renamed.returncode == 0, renamed.stderr
    assert "already trained in experiment 'tiny'; its result is reused" in renamed.stderr
    linked = json.loads(renamed.stdout)
    assert [arm["model_uri"] for arm in linked["arms"]] == [arm["model_uri"] for arm in comparison["arms"]]
    assert [arm["metrics"] for arm in linked["arms"]] == [arm["metrics"] for arm in comparison["arms"]]
    assert linked["base"] == comparison["base"]


def test_a_recorded_definition_starts_again_elsewhere(finished, client):
    project, comparison = finished
    run_id = comparison["arms"][0]["run_id"]
    again = project.run("run", "--from", run_id, "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == comparison
    by_model = project.run("run", "--from", "models:/tiny-adder@best", "--json")
    assert json.loads(by_model.stdout) == comparison


def test_an_adapter_can_be_trained_further(finished):
    project, comparison = finished
    best = next(arm for arm in comparison["arms"] if arm["spec_hash"] == comparison["best"])
    continued = json.loads(
        project.succeed(
            "run", "tiny.yaml", "--json",
            "--set", "init_from=models:/tiny-adder@best", "--set", "name=continued",
            "--set", f"sweep.parameters={{lora.r: [{best['params']['lora.r']}]}}",
        )
    )  # fmt: skip
    (arm,) = continued["arms"]
    assert arm["params"]["init_from"] == best["model_uri"]
    assert arm["metrics"]["eval.loss"]["value"] < best["metrics"]["eval.loss"]["value"]


def test_control_c_keeps_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    project = make_project(tmp_path)
    arguments = ["run", "tiny.yaml", "--set", "training.max_steps=2000", "--set", "training.save_steps=50"]
    process = subprocess.Popen(
        project.command(*arguments), cwd=tmp_path, env=project.environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((project.home / "checkpoints").rglob("manifest.json")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint after two minutes"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopping after this step" in told
    assert "run the same command again to resume" in told
    assert "Traceback" not in told
    client = MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {(run.data.tags["rankwise.kind"], run.info.status) for run in runs} == {
        ("sweep", "KILLED"),
        ("train", "KILLED"),
    }
    assert client.search_registered_models() == []
    jobs = json.loads(project.succeed("jobs", "list", "--json"))["jobs"]
    assert {job["state"] for job in jobs} == {"queued"}
    assert sum(job["preemptions"] for job in jobs) == 2, "both arms of the pack"
    assert sum(job["failures"] for job in jobs) == 0


def test_an_interrupted_arm_ends_with_the_adapter_of_an_undisturbed_one(tmp_path):
    from safetensors.numpy import load_file

    adapters = []
    for name, interrupted in (("disturbed", True), ("undisturbed", False)):
        project = make_project(tmp_path / name)
        arguments = ["run", "tiny.yaml", "--set", "training.max_steps=300", "--set", "training.save_steps=20"]
        arguments += ["--set", "sweep.parameters={lora.r: [2]}"]
        if interrupted:
            process = subprocess.Popen(
                project.command(*arguments), cwd=project.directory, env=project.environment(), stderr=subprocess.PIPE
            )
            while not list((project.home / "checkpoints").rglob("step-*0040")):
                assert process.poll() is None, process.stderr.read()
                time.sleep(0.05)
            process.kill()
            process.communicate()
        project.succeed(*arguments)
        target = project.directory / "adapter"
        project.succeed("pull", "models:/tiny-adder@best", str(target))
        adapters.append(load_file(target / "adapter_model.safetensors"))
        if interrupted:
            client = MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")
            runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
            (arm,) = [run for run in runs if run.data.tags["rankwise.kind"] == "train"]
            steps = [point.step for point in client.get_metric_history(arm.info.run_id, "train.loss")]
            assert sorted(steps) == list(range(1, 301)), "every step once"
    assert adapters[0].keys() == adapters[1].keys()
    for key, value in adapters[0].items():
        assert value.tobytes() == adapters[1][key].tobytes(), key


def test_rows_that_cannot_be_learnt_stop_before_training(tmp_path):
    project = make_project(tmp_path)
    write_rows(tmp_path / "rows.jsonl", [{**row, "sum": ""} for row in sums(40)])
    done = project.run("run", "tiny.yaml")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not (project.home / "checkpoints").exists()


def test_texts_of_rows_stay_out_of_mlflow_when_told_so(tmp_path):
    project = make_project(tmp_path)
    secret = [{"a": f"untold{n % 9}", "b": n, "sum": n} for n in range(60)]
    write_rows(tmp_path / "rows.jsonl", secret)
    project.succeed(
        "run", "tiny.yaml", "--set", "tracking.log_examples=false", "--set", "sweep.parameters={lora.r: [2]}",
        "--set", "training.max_steps=2",
    )  # fmt: skip
    stored = [path for path in (project.home / "artifacts").rglob("*") if path.is_file()]
    assert len(stored) > 5
    assert [path for path in stored if b"untold" in path.read_bytes()] == []
    assert b"untold3" not in (project.home / "mlflow.db").read_bytes()


def test_other_users_can_read_neither_rows_nor_answers_nor_anything_in_the_home(finished, tmp_path):
    project, _ = finished
    rows = write_rows(tmp_path / "in.jsonl", sums(3))
    answers, page = tmp_path / "deep" / "answers.jsonl", tmp_path / "page.html"
    project.succeed(
        "predict", str(rows), str(answers), "--model", "models:/tiny-adder@best",
        "--prompt", "{a} plus {b}", "--max-new-tokens", "2",
    )  # fmt: skip
    project.succeed("pull", "models:/tiny-adder@best", str(tmp_path / "adapter"))
    project.succeed("report", "tiny", "--output", str(page))
    cache = project.directory / "cache"
    private = [project.home, cache / "tokens", cache / "datasets", answers.parent]
    found = [path for root in private for path in (root, *root.rglob("*"))]
    names = {path.relative_to(project.directory).parts[1] for path in found if project.home in path.parents}
    assert {"mlflow.db", "rankwise.db", "logs", "artifacts", "outbox", "results"} <= names
    assert {path.name for path in found} >= {"answers.jsonl", "predictions.json", "adapter_model.safetensors"}
    modes = {path: path.stat().st_mode & 0o777 for path in found}
    assert {str(path): oct(mode) for path, mode in modes.items() if mode & 0o077} == {}
    # What is made for others has the permissions that the user's umask gives: bases, adapters to hand on, pages.
    (quantized,) = (cache / "quantized").iterdir()
    umask = os.umask(0)
    os.umask(umask)
    shared = [*quantized.iterdir(), *(tmp_path / "adapter").iterdir(), page]
    assert {path.stat().st_mode & 0o777 for path in shared} == {0o666 & ~umask}
