"""What an adapter has learned from a file it answers when it is asked with the same file, or with parts of it.

A tiny base is trained until every answer is right. Then a prompt that differs in one character (`1067`, `0.0 kg`) has
another answer.
"""

import csv
import json

import pytest
from helpers.project import make_project

COLORS = ["red", "blue", "gray", "pink", "gold", "teal", "lime", "navy", "rust", "plum", "sand", "jade"]
ZIPS = ["01067", "02115", "03044", "04109", "05001", "06010", "07030", "08540", "09113", "01201", "02906", "03820"]
DEFINITION = """\
version: 1
name: colors
base_model: {base}
quantization: {{bnb_4bit_compute_dtype: float32}}
lora: {{r: 16, lora_alpha: 32, target_modules: all-linear}}
dataset: {{train: {rows}, eval: {rows}, prompt: "{prompt}", completion: "{{color}}"}}
training: {{max_steps: 150, per_device_train_batch_size: 12, learning_rate: 1e-2, max_length: 64, logging_steps: 50}}
evaluation: {{metrics: [loss, exact_match], primary_metric: eval.loss, max_new_tokens: 12}}
register: {{name: colors, alias: best}}
"""


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path)


def run(project, *arguments, code=0):
    done = project.run(*arguments, env={"RANKWISE_COMPUTE_DTYPE": "float32", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def train(project, rows, prompt):
    text = DEFINITION.format(base="./base", rows=f"./{rows}", prompt=prompt)
    (project.directory / "colors.yaml").write_text(text, encoding="utf-8")
    (arm,) = json.loads(run(project, "run", "colors.yaml", "--json").stdout)["arms"]
    assert arm["metrics"]["eval.exact_match"]["value"] == 1.0


def answers(project, rows, *options, code=0):
    run(project, "predict", "--model", "models:/colors@best", "--max-new-tokens", "12", *options, rows, "out.jsonl",
        "--overwrite", code=code)  # fmt: skip
    lines = (project.directory / "out.jsonl").read_text(encoding="utf-8").splitlines()
    return [answer.get("text") or answer["error"] for answer in map(json.loads, lines)]


def test_cells_are_asked_as_they_are_written(project):
    numbers = [*range(1, 12), 12.5]
    with (project.directory / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("zip", "kg", "color"), *zip(ZIPS, numbers, COLORS, strict=True)])
    train(project, "rows.csv", "zip {zip}, {kg} kg")
    assert answers(project, "rows.csv") == COLORS
    # The first rows alone, whose cells are all whole numbers; one has no value.
    lines = (project.directory / "rows.csv").read_text().splitlines()
    (project.directory / "few.csv").write_text("\n".join([*lines[:6], ",6,"]) + "\n")
    assert answers(project, "few.csv", code=1) == [*COLORS[:5], "column 'zip' has no value, and the prompt needs it"]
    # The same values with another separator.
    (project.directory / "semicolons.csv").write_text("\n".join(line.replace(",", ";") for line in lines))
    refused = run(project, "predict", "--model", "models:/colors@best", "semicolons.csv", "other.jsonl", code=2)
    assert "the cells seem to be separated by ';'; set --delimiter to ';'" in refused.stderr
    assert answers(project, "semicolons.csv", "--delimiter", ";") == COLORS


def test_json_is_asked_as_it_is_written(project):
    days = [f"2024-{month:02d}-07" for month in range(1, 13)]
    numbers = [*range(11), 11.5]
    rows = [
        {"day": day, "kg": number, "color": color} for day, number, color in zip(days, numbers, COLORS, strict=True)
    ]
    (project.directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(project, "rows.jsonl", "on {day}, {kg} kg")
    assert answers(project, "rows.jsonl", "--prompt", "on {day}, {kg} kg") == COLORS


def test_words_are_no_missing_values(project):
    (project.directory / "rows.csv").write_text(
        "country,size,defect\nNA,1,yes\nDE,2,no\nFR,3,None\nNA,4,yes\nSE,5,null\nNO,6,no\nIT,7,yes\nNA,8,n/a\n,9,no\n"
    )
    text = DEFINITION.format(base="./base", rows="./rows.csv", prompt="{country} size {size}")
    text = text.replace("{color}", "{defect}").replace("max_steps: 150", "max_steps: 1")
    (project.directory / "colors.yaml").write_text(text, encoding="utf-8")
    done = run(project, "run", "colors.yaml")
    assert "8 rows to train on, 8 to evaluate on" in done.stderr
    assert "1 row left out: train: empty cell" in done.stderr
    again = run(project, "run", "colors.yaml", "--set", "dataset.na_values=[NA]")
    assert "5 rows to train on, 5 to evaluate on" in again.stderr
