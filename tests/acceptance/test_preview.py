"""`rankwise preview`: what rows become, without training."""

import json

import pytest
from helpers.project import make_project, write_rows


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_project(tmp_path_factory.mktemp("preview"), fresh=True)


def test_rows_lengths_and_masks_are_shown_and_nothing_is_trained(project):
    shown = project.run("preview", "tiny.yaml", "--rows", "1")
    assert shown.returncode == 0, shown.stderr
    assert "format: prompt_completion" in shown.stdout
    assert "train: 67 rows used, 0 left out, 0 truncated" in shown.stdout
    assert "tokens per row (training.max_length: 64)" in shown.stdout
    assert "⟦" in shown.stdout
    assert not project.home.exists()


def test_json_has_the_rendered_texts_and_the_counts(project):
    write_rows(
        project.directory / "some.jsonl",
        [{"a": 1, "b": 2, "sum": 3}, {"a": None, "b": 2, "sum": 3}, {"a": "long " * 40, "b": 2, "sum": 3}],
    )
    page = project.directory / "page.html"
    overrides = ["--set", "dataset.train=./some.jsonl", "--set", "dataset.eval=null", "--set", "register=null"]
    found = json.loads(project.succeed("preview", "tiny.yaml", *overrides, "--json", "--html", str(page)))
    assert found["format"] == "prompt_completion"
    (row,) = found["rows"]
    assert row["id"] == "0"
    assert "1 plus 2" in row["prompt"]
    assert row["completion"] == "3"
    assert 0 < row["supervised"] < row["tokens"]
    assert found["dropped"] == sum(found["dropped_by_reason"].values()) == 2
    assert found["dropped_by_reason"]["empty cell"] == 1
    assert (found["used"], found["truncated"], found["eval"]) == (1, 0, None)
    assert sum(each["rows"] for each in found["lengths"]["histogram"]) == 2
    assert "too_long" in {each["code"] for each in found["warnings"]}
    assert page.read_text().startswith("<!doctype html>")


def test_data_that_a_run_would_refuse_have_exit_code_2(project):
    done = project.run("preview", "tiny.yaml", "--set", "dataset.completion=x {nowhere}")
    assert done.returncode == 2
    assert "unknown column 'nowhere'" in done.stderr
    done = project.run("preview", "tiny.yaml", "--set", "training.max_length=4")
    assert done.returncode == 2
    assert "none of the 67 rows fits into training.max_length=4" in done.stderr
    assert "Traceback" not in done.stderr
