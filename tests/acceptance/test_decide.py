"""From a finished sweep to a decision: evaluate, promote, roll back, predict, as a user types them."""

import json
from pathlib import Path

import pytest
from helpers.project import make_project, sums, write_rows
from helpers.tiny import make_base
from mlflow import MlflowClient

PROMOTION = "promotion={min_examples: 5, max_overlap: 0.5, confidence: 0.9}"

FIRST = ["--set", "sweep.parameters={lora.r: [2]}", "--set", "training.max_steps=1"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two versions of `tiny-adder`: r = 2 is hardly trained, r = 4 is."""
    project = make_project(tmp_path_factory.mktemp("decide"))
    second = ["--set", "sweep.parameters={lora.r: [4]}", "--set", "training.max_steps=40"]
    for chosen in (FIRST, second):
        project.succeed("run", "tiny.yaml", *chosen, "--set", PROMOTION, "--set", "training.warmup_steps=0")
    return project


@pytest.fixture
def client(project):
    return MlflowClient(f"sqlite:///{project.home / 'mlflow.db'}")


def alias(client, name="champion"):
    return client.get_registered_model("tiny-adder").aliases.get(name)


def test_promote_and_roll_back(project, client):
    assert alias(client) is None
    done = project.run("promote", "tiny-adder", "--candidate", "1", "--force", "--reason", "somebody must begin")
    assert done.returncode == 0, done.stderr
    assert "models:/tiny-adder@champion is now version 1 (by force; it was unset)" in done.stderr
    # The better one passes.
    found = json.loads(project.succeed("promote", "tiny-adder", "--candidate", "2", "--json"))
    assert (found["passed"], found["moved"], found["forced"]) == (True, True, False)
    assert {check["against"] for check in found["checks"] if check["name"] == "improvement"} == {"champion", "base"}
    assert alias(client) == 2
    # The evidence is a run that the version links to.
    version = client.get_model_version("tiny-adder", "2")
    run = client.get_run(version.tags["rankwise.promotion_run"])
    assert run.info.run_id == found["run_id"]
    assert {item.path for item in client.list_artifacts(found["run_id"])} >= {
        "gate.json", "candidate.json", "champion.json", "base.json"
    }  # fmt: skip
    # Again: nothing to do. The worse one is refused, with reasons, and nothing moves.
    assert "models:/tiny-adder@champion is already" in project.run("promote", "tiny-adder", "--candidate", "2").stderr
    refused = project.run("promote", "tiny-adder", "--candidate", "1")
    assert refused.returncode == 1
    assert "fails  eval.loss against the champion: +" in refused.stdout
    assert "refused: models:/tiny-adder@champion stays version 2" in refused.stderr
    assert alias(client) == 2
    # It was the third comparison on these rows. The same one again costs nothing and has the same result.
    assert "this is attempt 3 on these rows for @champion" in " ".join(refused.stdout.split())
    stored = project.run("promote", "tiny-adder", "--candidate", "1", "--json")
    assert (stored.returncode, json.loads(stored.stdout)["stored"]) == (1, True)
    assert "the stored verdict of an earlier, equal comparison" in stored.stderr
    assert json.loads(stored.stdout)["run_id"] in refused.stderr
    # Back, and back again is told from a first move that had nobody before it.
    back = project.run("rollback", "tiny-adder")
    assert (back.returncode, alias(client)) == (0, 1), back.stderr
    assert "models:/tiny-adder@champion is version 1 again; it was version 2" in back.stderr
    back = project.run("rollback", "tiny-adder", "--json")
    assert "models:/tiny-adder@champion is unset again; it was version 1" in back.stderr
    assert json.loads(back.stdout) == {
        "schema_version": 1,
        "name": "tiny-adder",
        "alias": "champion",
        "from": 1,
        "to": None,
    }
    assert alias(client) is None


def test_the_same_command_again_compares_its_own_sweep_and_another_primary_metric_ranks_anew(project):
    first = ["run", "tiny.yaml", *FIRST, "--set", PROMOTION, "--set", "training.warmup_steps=0", "--json"]
    again = json.loads(project.succeed(*first))
    assert [arm["params"]["lora.r"] for arm in again["arms"]] == [2]
    assert again["primary_metric"]["name"] == "eval.loss"
    other = json.loads(project.succeed(*first, "--set", "evaluation.primary_metric=eval.token_accuracy"))
    assert [arm["run_id"] for arm in other["arms"]] == [arm["run_id"] for arm in again["arms"]]
    assert other["primary_metric"] == {"name": "eval.token_accuracy", "greater_is_better": True}


def test_an_alias_that_somebody_else_moved_is_not_rolled_back(project, client):
    done = project.run("promote", "tiny-adder", "--candidate", "2", "--alias", "other", "--limit", "12")
    assert done.returncode == 0, done.stderr
    client.set_registered_model_alias("tiny-adder", "other", "1")
    refused = project.run("rollback", "tiny-adder", "--alias", "other")
    assert refused.returncode == 2
    assert "it was moved by other means" in refused.stderr
    assert alias(client, "other") == 1


def test_force_needs_a_reason_and_a_version_must_be_there(project):
    assert "--force and --reason go together" in project.run(
        "promote", "tiny-adder", "--candidate", "1", "--force"
    ).stderr  # fmt: skip
    missing = project.run("promote", "tiny-adder", "--candidate", "9")
    assert missing.returncode == 3
    assert "no such version or alias; versions of 'tiny-adder': 1, 2" in missing.stderr
    assert "Traceback" not in missing.stderr
    assert project.run("rollback", "tiny-adder", "--alias", "nobody").returncode == 2


def test_rows_that_were_trained_on_are_left_out_and_too_many_are_refused(project):
    # All of these sums are in the training data.
    write_rows(project.directory / "seen.jsonl", sums(80))
    found = project.run(
        "promote", "tiny-adder", "--candidate", "2", "--alias", "seen", "--data", "seen.jsonl", "--json"
    )
    assert found.returncode == 1, found.stderr
    checks = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
    assert not checks["overlap"]["ok"]
    assert (
        "were in the candidate's training data and are left out; at most 50.0% are allowed"
        in (checks["overlap"]["text"])
    )


def test_evaluate_on_other_rows_and_by_other_quantizations(project, client):
    write_rows(project.directory / "other.jsonl", [{"a": n, "b": 20, "sum": n + 20} for n in range(9)])
    found = json.loads(
        project.succeed(
            "evaluate", "models:/tiny-adder/1", "models:/tiny-adder/2", "--data", "other.jsonl",
            "--metrics", "loss,number", "--json",
        )
    )  # fmt: skip
    assert [row["model"] for row in found["models"]] == ["models:/tiny-adder/1", "models:/tiny-adder/2", "base"]
    assert all(row["metrics"]["eval.loss"]["n"] == 9 for row in found["models"])
    losses = [row["metrics"]["eval.loss"]["value"] for row in found["models"]]
    assert losses[1] < losses[2]
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], "tags.`rankwise.kind` = 'evaluate'")
    assert {run.data.params["model"] for run in runs} == {"models:/tiny-adder/1", "models:/tiny-adder/2", "base"}
    assert all(run.inputs.dataset_inputs for run in runs)
    model = client.get_logged_model(client.get_model_version("tiny-adder", "2").source.removeprefix("models:/"))
    assert "eval.within_20_percent" in {metric.key for metric in model.metrics}
    metered = json.loads(
        project.succeed(
            "evaluate", "models:/tiny-adder/2", "--quantization", "nf4,none", "--no-tracking", "--json"
        )
    )  # fmt: skip
    assert [row["quantization"] for row in metered["models"]] == ["nf4", "nf4", "none", "none"]
    lines = {(line["model"], line["key"]): line for line in metered["meter"]}
    assert lines["models:/tiny-adder/2", "eval.loss"]["difference"] != 0
    assert 0 <= lines["models:/tiny-adder/2", "eval.loss"]["equal_generations"] <= 1


def test_who_has_no_training_data_promotes_by_what_the_training_has_left(project, client, tmp_path):
    seen, fresh = sums(9), [{"a": n, "b": 20, "sum": n + 20} for n in range(12)]
    write_rows(project.directory / "mixed.jsonl", [*fresh, *seen])
    rows = project.directory / "rows.jsonl"
    rows.rename(tmp_path / "elsewhere.jsonl")
    command = ["promote", "tiny-adder", "--candidate", "2", "--alias", "mate", "--data", "mixed.jsonl"]
    run_id = client.get_model_version("tiny-adder", "2").run_id
    digests = Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://")) / "row_digests.bin"
    try:
        found = json.loads(project.succeed(*command, "--json"))
        (overlap,) = [check for check in found["checks"] if check["name"] == "overlap"]
        assert "8 of 21 examples (38.1%) were in the candidate's training data and are left out" in overlap["text"]
        assert found["moved"]
        # One of the nine is an evaluation row of the split. The evidence is of the rows that were compared.
        assert client.get_run(found["run_id"]).data.metrics["eval.loss.n"] == 13
        assert b"plus" not in digests.read_bytes()
        # Changed, and gone: it is refused before anything is computed, with what to do.
        client.delete_registered_model_alias("tiny-adder", "mate")
        kept = digests.read_bytes()
        digests.write_bytes(kept[:-1] + b"x")
        changed = project.run(*command)
        assert changed.returncode == 1
        assert f"row_digests.bin of run {run_id} is not what was stored" in changed.stderr
        digests.unlink()
        refused = project.run(*command)
        assert refused.returncode == 1
        assert "its run has no row_digests.bin, and the training data cannot be read here" in refused.stderr
        assert "--experiment FILE" in refused.stderr
        assert "Traceback" not in refused.stderr
        forced = json.loads(project.succeed(*command, "--force", "--reason", "checked by hand", "--json"))
        assert (forced["passed"], forced["moved"], forced["forced"]) == (False, True, True)
        (overlap,) = [check for check in forced["checks"] if check["name"] == "overlap"]
        assert "are unknown, so none was left out" in overlap["text"]
        digests.write_bytes(kept)
    finally:
        (tmp_path / "elsewhere.jsonl").rename(rows)
    # With the training data at hand and without the digests: as before there were any.
    digests.rename(tmp_path / "digests")
    client.delete_registered_model_alias("tiny-adder", "mate")
    found = json.loads(project.succeed(*command, "--json"))
    (tmp_path / "digests").rename(digests)
    assert "8 of 21 examples" in next(check["text"] for check in found["checks"] if check["name"] == "overlap")


def test_predict_by_alias_out_of_the_registry(project, client):
    client.set_registered_model_alias("tiny-adder", "best", "2")  # Whatever sweep was reported last.
    write_rows(project.directory / "ask.jsonl", [{"a": 1, "b": 2}, {"a": 3, "b": 4, "model": "models:/tiny-adder/1"}])
    printed = project.succeed(
        "predict", "--model", "models:/tiny-adder@best", "--prompt", "{a} plus {b}", "--max-new-tokens", "4",
        "ask.jsonl", "answers.jsonl",
    )  # fmt: skip
    assert printed == "answers.jsonl\n"
    rows = [json.loads(line) for line in (project.directory / "answers.jsonl").read_text().splitlines()]
    assert [row["version"] for row in rows] == ["2", "1"]
    assert rows[1]["input.model"] == "models:/tiny-adder/1"


def test_models_of_different_bases_are_each_evaluated_over_their_own(project, client):
    make_base(project.directory / "other-base", seed=7)
    definition = project.file.read_text().replace("./base", "./other-base").replace("name: tiny\n", "name: other\n")
    (project.directory / "other.yaml").write_text(definition)
    project.succeed(
        "run", "other.yaml", "--set", "sweep.parameters={lora.r: [4]}", "--set", "training.max_steps=40",
        "--set", PROMOTION, "--set", "training.warmup_steps=0",
    )  # fmt: skip
    found = json.loads(
        project.succeed(
            "evaluate", "models:/tiny-adder/2", "models:/tiny-adder/3", "--metrics", "loss,number", "--json"
        )
    )
    assert [row["model"] for row in found["models"]] == [
        "models:/tiny-adder/2", "models:/tiny-adder/3", "base", "base of models:/tiny-adder/3"
    ]  # fmt: skip
    prints = [row["base"]["fingerprint"] for row in found["models"]]
    assert prints[0] == prints[2] != prints[1] == prints[3]
    losses = [row["metrics"]["eval.loss"]["value"] for row in found["models"]]
    assert losses[0] < losses[2]
    assert losses[1] < losses[3]
    client.set_registered_model_alias("tiny-adder", "both", "1")
    done = json.loads(project.succeed("promote", "tiny-adder", "--candidate", "3", "--alias", "both", "--json"))
    assert done["moved"]
    evidence = client.get_run(done["run_id"])
    assert evidence.data.params["candidate.base_fingerprint"] == prints[1]
    assert evidence.data.params["champion.base_fingerprint"] == prints[0]
    assert prints[0] in evidence.data.tags["mlflow.note.content"]
    assert prints[1] in evidence.data.tags["mlflow.note.content"]
