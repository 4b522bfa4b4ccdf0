from __future__ import annotations

import json

import pytest
from helpers.definitions import COMMIT, parse

from rankwise.exceptions import ConfigError
from rankwise.experiment.plan import MAX_COUNTED_BYTES, count_rows, make_plan

EPOCHS = ("  max_steps: 20", "  num_train_epochs: 2")


def test_a_plan_has_the_arms_with_steps_and_an_upper_bound_of_tokens():
    experiment = parse(("  warmup_steps: 5", "  warmup_steps: 5\n  gradient_accumulation_steps: 2\n  max_length: 64"))
    plan = make_plan(experiment)
    assert [planned.arm for planned in plan.arms] == list(experiment.arms)
    assert {(planned.steps, planned.tokens) for planned in plan.arms} == {(20, 20 * 8 * 2 * 64)}
    assert [planned.label for planned in plan.arms] == ["lora.r=4", "lora.r=8"]


def test_the_json_is_what_others_build_on():
    plan = make_plan(parse())
    estimates = {planned.arm.spec_hash: {"adapter_parameters": 7, "adapter_bytes_fp32": 28} for planned in plan.arms}
    data = json.loads(json.dumps(plan.with_estimates(estimates).to_json()))
    assert data["experiment"] == "small"
    assert data["provisional"] is False
    first = data["arms"][0]
    assert first["spec_hash"] == plan.arms[0].arm.spec_hash
    assert first["params"]["lora.r"] == 4
    assert first["estimates"] == {
        "adapter_parameters": 7, "adapter_bytes_fp32": 28, "steps": 20, "tokens": 20 * 8 * 1024,
    }  # fmt: skip


def test_a_plan_is_provisional_while_a_pin_is_open():
    plan = make_plan(parse((f"base_model_revision: {COMMIT}", "base_model_revision: main")))
    assert plan.provisional
    assert plan.to_json()["arms"][0]["provisional"] is True


def test_epochs_become_steps_once_the_rows_are_known():
    experiment = parse(EPOCHS)
    assert {planned.steps for planned in make_plan(experiment).arms} == {None}
    assert make_plan(experiment).to_json()["arms"][0]["estimates"] == {"steps": None, "tokens": None}
    # 100 rows, 20 of them held out: 80 rows, batches of 8, twice.
    assert {planned.steps for planned in make_plan(experiment, 100).arms} == {20}


def test_a_limit_bounds_the_rows_of_training():
    experiment = parse(EPOCHS, ("dataset:\n", "dataset:\n  limit: {train: 40}\n"))
    assert {planned.steps for planned in make_plan(experiment, 100).arms} == {10}
    assert {planned.steps for planned in make_plan(experiment, 30).arms} == {4}


def test_few_rows_make_a_small_batch():
    (first, *_) = make_plan(parse(EPOCHS), 25).arms
    assert (first.steps, first.tokens) == (2, 2 * 5 * 1024)


def test_a_split_that_leaves_nothing_for_training_is_an_error():
    with pytest.raises(ConfigError, match=r"^dataset\.eval\.rows: must be less than the 20 rows of org/rows, got 20$"):
        make_plan(parse(), 20)


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2}\n', 2),
        ("a.csv", 'x,y\n1,"two\nlines"\n3,4\n\n', 2),
        ("a.tsv", "x\ty\n1\t2\n", 1),
        ("a.csv", "", 0),
        ("a.parquet", "x", None),
    ],
)
def test_rows_of_small_local_tables_are_counted(name, text, rows, tmp_path):
    (tmp_path / name).write_text(text)
    assert count_rows(str(tmp_path / name)) == rows


def test_long_cells_are_counted_too(tmp_path):
    (tmp_path / "a.csv").write_text("x\n" + "y" * 200_000)
    assert count_rows(str(tmp_path / "a.csv")) == 1


def test_rows_of_large_tables_and_of_other_sources_are_not_counted(tmp_path):
    with (tmp_path / "large.csv").open("wb") as file:
        file.truncate(MAX_COUNTED_BYTES + 1)
    assert count_rows(str(tmp_path / "large.csv")) is None
    assert count_rows("org/rows") is None
    assert count_rows("pypi:a==1#b.csv") is None
    assert count_rows(str(tmp_path / "missing.csv")) is None


GRID = "  parameters:\n    lora.r: [4, 8]"
RANGE = "  trials: 10\n  parameters:\n    lora.r: {int: [2, 64], log: true}\n  method: "


def test_a_random_search_is_known_as_a_whole():
    plan = make_plan(parse((GRID, f"{RANGE}random")))
    assert len(plan.arms) == plan.trials == 10
    assert plan.to_json()["search"] == {"method": "random", "trials": 10, "rounds": [10]}
    assert "early_stopping" not in plan.to_json()


def test_of_a_search_by_results_the_first_round_is_known():
    plan = make_plan(parse((GRID, f"{RANGE}tpe\n  round_size: 4")))
    assert (len(plan.arms), plan.trials) == (4, 10)
    assert plan.to_json()["search"]["rounds"] == [4, 4, 2]


def test_a_plan_says_what_early_stopping_saves():
    stopping = "  early_stopping: {min_steps: 5, eta: 2, metric: eval.loss}"
    plan = make_plan(parse((GRID, f"    lora.r: [1, 2, 3, 4, 5, 6, 7, 8]\n{stopping}".join(["  parameters:\n", ""]))))
    assert plan.to_json()["early_stopping"] == {
        "metric": "eval.loss",
        "eta": 2,
        "finalists": 1,
        "rungs": [{"step": 5, "arms": 8, "kept": 4}, {"step": 10, "arms": 4, "kept": 2}],
        "steps": {"expected": 8 * 5 + 4 * 5 + 2 * 10, "upper": 160},
    }
    # Arms of a search in rounds are compared within their round; of the last one, of two arms, one is left at once.
    rounds = make_plan(parse((GRID, f"{RANGE}tpe\n  round_size: 4\n{stopping}")))
    assert rounds.to_json()["early_stopping"]["rungs"] == [
        {"step": 5, "arms": 10, "kept": 5}, {"step": 10, "arms": 4, "kept": 2},
    ]  # fmt: skip
    # Seeds of a configuration share its place: one of two configurations goes on with its three seeds.
    seeds = make_plan(parse((GRID, f"{GRID}\n    seed: [0, 1, 2]\n{stopping}")))
    assert seeds.to_json()["early_stopping"]["rungs"] == [{"step": 5, "arms": 6, "kept": 3}]
    assert seeds.to_json()["early_stopping"]["steps"] == {"expected": 6 * 5 + 3 * 15, "upper": 120}
    unknown = make_plan(parse(EPOCHS, (GRID, f"{GRID}\n{stopping}")))
    assert unknown.to_json()["early_stopping"]["steps"] == {"expected": None, "upper": None}
