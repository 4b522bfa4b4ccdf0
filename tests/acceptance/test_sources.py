"""Several sources through the command line: their weights are an axis, and each has a loss of its own."""

import json

import pytest
from helpers.project import make_project
from mlflow import MlflowClient

DEFINITION = """\
version: 1
name: mix
base_model: ./base
lora: {r: 4, lora_alpha: 8, target_modules: [q_proj, v_proj]}
dataset:
  train:
    - {source: sums.csv, weight: 1, delimiter: ";"}
    - {source: chats.jsonl, weight: 1, format: sharegpt, label: double}
  eval: {split_from: train, rows: 16}
  prompt: "{a} plus {b}"
  completion: "{sum}"
training: {num_train_epochs: 1, per_device_train_batch_size: 8, learning_rate: 1e-2, max_length: 64, eval_steps: 4}
sweep: {parameters: {"dataset.train[0].weight": [1, 3]}}
evaluation: {metrics: [loss], primary_metric: eval.loss.double}
register: {name: mixed, alias: best, checkpoint: best}
"""


@pytest.fixture
def project(tmp_path):
    project = make_project(tmp_path)
    sums = [f"{a};{b};{a + b}" for a in range(8) for b in range(8)]
    (project.directory / "sums.csv").write_text("\n".join(["a;b;sum", *sums, "1;;2"]))
    chats = (
        [{"from": "human", "value": f"double {number}?"}, {"from": "gpt", "value": str(2 * number)}]
        for number in range(24)
    )
    (project.directory / "chats.jsonl").write_text("\n".join(json.dumps({"conversations": chat}) for chat in chats))
    (project.directory / "mix.yaml").write_text(DEFINITION)
    return project


def run(project, *arguments, code=0):
    done = project.run(*arguments, env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def test_weights_of_sources_are_compared_by_the_loss_of_one_of_them(project):
    arms = json.loads(run(project, "plan", "mix.yaml", "--no-estimates", "--json").stdout)["arms"]
    assert [arm["estimates"]["steps"] for arm in arms] == [10, 10]

    shown = json.loads(run(project, "preview", "mix.yaml", "--rows", "1", "--json").stdout)
    assert [row["id"] for row in shown["rows"]] == ["sums/0", "double/0"]
    assert shown["dropped_by_reason"] == {"sums: empty cell": 1}
    assert shown["sources"]["double"] == {"format": "sharegpt", "used": 36, "dropped": 0, "truncated": 0}
    assert {label: source["used"] for label, source in shown["eval"]["sources"].items()} == {"sums": 11, "double": 5}

    done = run(project, "run", "mix.yaml", "--json")
    assert "rows: 72 rows to train on (sums 36, double 36), 16 to evaluate on" in done.stderr
    for arm in json.loads(done.stdout)["arms"]:
        losses = {name: arm["metrics"][f"eval.loss{name}"] for name in ("", ".sums", ".double")}
        assert [losses[name]["n"] for name in losses] == [16, 11, 5]
        # All answers have the same number of tokens but for two digits, so the whole is between its parts.
        parts = sorted(losses[name]["value"] for name in (".sums", ".double"))
        assert parts[0] <= losses[""]["value"] <= parts[1]

    client = MlflowClient(f"sqlite:///{project.home}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'mix'")
    runs = client.search_runs([experiment.experiment_id], "tags.`rankwise.kind` = 'train'")
    assert {each.data.params["dataset.train.0.weight"] for each in runs} == {"1", "3"}
    for each in runs:
        inputs = [(given.dataset.name, given.tags[0].value) for given in each.inputs.dataset_inputs]
        assert inputs == [(name, side) for side in ("train", "eval") for name in ("sums.csv", "chats.jsonl")]
        steps = {point.step for point in client.get_metric_history(each.info.run_id, "eval.loss.double")}
        assert {4, 8} < steps

    assert "nothing to do: all 2 arms" in run(project, "run", "--from", "models:/mixed@best").stderr
    (project.directory / "new.jsonl").write_text('{"a": 1, "b": 2}\n')
    run(project, "predict", "--model", "models:/mixed@best", "--max-new-tokens", "2", "new.jsonl", "out.jsonl")
    (answer,) = map(json.loads, (project.directory / "out.jsonl").read_text().splitlines())
    assert "text" in answer
