"""Early stopping and search as `rankwise run` does them, from the definition to the registry, in this process."""

from __future__ import annotations

import json

import pytest
from helpers.inline_worker import run_inline
from helpers.local_store import prepared_home
from helpers.project import sums, write_rows
from helpers.tiny import make_base

from rankwise.experiment.experiment import parse_experiment
from rankwise.jobs.job import JobKind
from rankwise.jobs.store import JobStore
from rankwise.tracking.query import search_runs
from rankwise.tracking.store import Store

DEFINITION = """\
version: 1
name: {name}
base_model: {base}
quantization: {{load_in_4bit: false}}
lora: {{r: 4, lora_alpha: 2*r, target_modules: [q_proj]}}
dataset:
  train: {rows}
  eval: {{split_from: train, rows: 6, seed: 0}}
  limit: {{train: 16}}
  prompt: "{{a}} plus {{b}}"
  completion: "{{sum}}"
training: {{max_steps: 8, per_device_train_batch_size: 2, learning_rate: 1e-2, max_length: 64, save_steps: 100}}
evaluation: {{metrics: [loss], primary_metric: eval.loss}}
register: {{name: {name}, alias: best}}
sweep: {sweep}
"""
HALVING = "{parameters: {lora.r: [1, 2, 3, 4, 5, 6, 7, 8]}, early_stopping: {min_steps: 2, eta: 2, metric: eval.loss}}"
TPE = "{method: tpe, trials: 4, round_size: 2, parameters: {training.learning_rate: {log_uniform: [1e-4, 1e-1]}}}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    return make_base(directory / "base"), write_rows(directory / "rows.jsonl", sums(40))


def definition(files, name: str, sweep: str) -> str:
    base, rows = files
    return DEFINITION.format(name=name, base=base, rows=rows, sweep=sweep)


def runs_of(settings, experiment, kind):
    with Store.open(settings) as store:
        return search_runs(store.client, store.find_experiment(experiment), kind=kind), store.client


def artifact(client, run_id, path, scratch):
    with open(client.download_artifacts(run_id, path, str(scratch)), encoding="utf-8") as file:
        return file.read()


@pytest.fixture(scope="module")
def halved(files, tmp_path_factory):
    """A home in which the sweep was run, its comparison, and what was told."""
    settings = prepared_home(tmp_path_factory.mktemp("halved") / "home")
    return (settings, *run_inline(settings, definition(files, "halved", HALVING), max_arms=5))


def test_a_sweep_of_eight_arms_is_halved_to_one_winner_in_the_registry(halved):
    settings, comparison, told = halved
    arms = {arm["spec_hash"]: arm for arm in comparison["arms"]}
    assert sorted(arm["status"] for arm in arms.values()) == ["FINISHED"] * 2 + ["KILLED"] * 6
    reasons = sorted(arm["reason"] for arm in arms.values() if arm["status"] == "KILLED")
    assert [reason[: len("pruned at step 2")] for reason in reasons] == ["pruned at step 2"] * 4 + [
        "pruned at step 4"
    ] * 2
    assert any("4 of 8 arms continue after step 2" in line for line in told)
    assert any("2 of 4 arms continue after step 4" in line for line in told)

    runs, _ = runs_of(settings, "halved", "train")
    # 8 arms to step 2, 4 to step 4, 2 to the end.
    with Store.open(settings) as store:
        steps = {
            run.spec_hash: [point.step for point in store.client.get_metric_history(run.run_id, "train.loss")]
            for run in runs
        }
        rungs = [len(store.client.get_metric_history(run.run_id, "eval.loss")) for run in runs]
        version = store.registry.resolve("models:/halved@best").version
    assert sorted(len(each) for each in steps.values()) == [2] * 4 + [4] * 2 + [8] * 2
    assert all(each == list(range(1, len(each) + 1)) for each in steps.values()), "no step is trained twice"
    assert sorted(rungs)[:6] == [1] * 4 + [2] * 2, "pruned arms keep their curves"
    best = arms[comparison["best"]]
    assert best["model_uri"] == f"models:/halved/{version.version}"
    assert sum(arm["model_uri"] is not None for arm in arms.values()) == 2


@pytest.mark.proof
def test_what_is_pruned_stays_so_in_its_sweep_and_goes_on_in_another(files, halved):
    settings, comparison, _ = halved
    _, told = run_inline(settings, definition(files, "halved", HALVING))
    assert told == ["nothing to do: all 8 arms are trained and evaluated"]
    # Without early stopping a pruned arm is trained to its end, from where it stopped.
    pruned = next(arm for arm in comparison["arms"] if arm["reason"] and arm["reason"].startswith("pruned at step 4"))
    wider = definition(files, "halved", f"{{parameters: {{lora.r: [{pruned['params']['lora.r']}]}}}}")
    comparison, _ = run_inline(settings, wider)
    (again,) = (arm for arm in comparison["arms"] if arm["spec_hash"] == pruned["spec_hash"])
    assert (again["status"], again["run_id"]) == ("FINISHED", pruned["run_id"])
    with Store.open(settings) as store:
        points = store.client.get_metric_history(pruned["run_id"], "train.loss")
    assert [point.step for point in points] == list(range(1, 9))


def test_a_search_goes_on_from_results_and_leaves_its_history(files, tmp_path):
    settings = prepared_home(tmp_path / "home")
    text = definition(files, "searched", TPE)
    comparison, told = run_inline(settings, text)
    assert [arm["status"] for arm in comparison["arms"]] == ["FINISHED"] * 4
    (second,) = (line for line in told if line.startswith("searched: round "))
    assert second.startswith("searched: round 2 of 2: 2 arms, proposed from 2 that have ended; best so far eval.loss ")
    first = {arm.spec_hash for arm in parse_experiment(text, "x").arms}
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    jobs = queue.jobs(kinds=[JobKind.TRAIN])
    queue.close()
    assert len(jobs) == 4
    assert len(first) == 2

    (sweep,), client = runs_of(settings, "searched", "sweep")
    assert (sweep.name, sweep.status) == ("sweep of 4 arms", "FINISHED")
    history = json.loads(artifact(client, sweep.run_id, "search/history.json", tmp_path))
    assert [trial["round"] for trial in history["trials"]] == [0, 0, 1, 1]
    assert [trial["spec_hash"] for trial in history["trials"]] == [job.spec_hash for job in jobs]
    values = {arm["spec_hash"]: arm["metrics"]["eval.loss"]["value"] for arm in comparison["arms"]}
    assert {trial["spec_hash"]: trial["value"] for trial in history["trials"]} == pytest.approx(values)
    better = min(history["trials"][:2], key=lambda trial: trial["value"])
    rate = better["parameters"]["training.learning_rate"]
    assert second.endswith(f" {better['value']:.4g} with training.learning_rate={rate}")
    assert history["trials"][-1]["best_so_far"] == pytest.approx(min(values.values()))
    assert "searched: search by tpe" in artifact(client, sweep.run_id, "search/history.html", tmp_path)

    _, told = run_inline(settings, text)
    assert told == ["nothing to do: all 4 arms are trained and evaluated"]
