"""`validate` opens local data: what a run would refuse is found without a base and without torch."""

import json
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import make_base

from rankwise.data.local_check import check_local_data
from rankwise.experiment.experiment import load_experiment
from rankwise.settings import Settings

DEFINITION = """\
version: 1
name: check
base_model: %s
lora: {r: 4, lora_alpha: 8, target_modules: [q_proj]}
dataset: {train: %s, prompt: "{a}", completion: "{b}"}
training: {max_steps: 3}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def check(tmp_path, base):
    """Write a data file and a definition that names it, and return the problems of its data."""

    def run(name, content, *overrides):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        file = tmp_path / "check.yaml"
        file.write_text(DEFINITION % (base, name))
        return check_local_data(load_experiment(file, overrides).spec, Settings.load({"RANKWISE_HOME": str(tmp_path)}))

    return run


def test_a_file_that_fits_has_no_problems(check):
    assert check("a.csv", "a,b\n1,2\n3,4\n") == ()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "a;b\n1;2\n", "the header is one column, 'a;b'.* set dataset.delimiter to ';'"),
        ("a.csv", "", "a.csv has no rows"),
        ("a.csv", "a,b\n", "a.csv has no rows"),
        ("a.csv", "a,c\n1,2\n", "unknown column 'b'.* Available columns: a, c"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv: line 2 has 3 cells, the header has 2 columns"),
        ("a.csv", "a,b\n1,\n", "none of the 1 rows of .* can be used: 1 with empty cell"),
        ("a.csv", b"a,b\n\xe9,2\n", "is not utf-8 text: byte 0xe9.* set dataset.encoding"),
        ("a.jsonl", '{"a": 1, "b": 2}\n{"a": 1, "b', "line 2 is not JSON.* is the file cut short"),
        ("a.jsonl", '{"a": [1], "b": 2}\n', "row 0"),
        ("a.parquet", "no parquet", "cannot read .*a.parquet"),
    ],
)
def test_what_a_run_would_refuse_is_said(check, name, content, problem):
    (found,) = check(name, content)
    assert re.search(problem, found), found


def test_only_the_first_rows_of_a_large_file_are_read(check):
    rows = [json.dumps({"a": n, "b": n}) for n in range(100)]
    assert check("a.jsonl", "\n".join([*rows, "no JSON"])) == ()
    assert check("a.jsonl", "\n".join([*rows[:99], "no JSON"])) != ()


def test_parquet_keeps_its_types(check, tmp_path):
    pq.write_table(pa.table({"a": [1, None], "b": ["x", "y"]}), tmp_path / "a.parquet")
    assert check("a.parquet", (tmp_path / "a.parquet").read_bytes()) == ()


def test_a_split_that_leaves_nothing_to_train_on(check):
    (found,) = check("a.csv", "a,b\n1,2\n3,4\n", "dataset.eval={split_from: train, rows: 2}")
    assert "dataset.eval.rows: 2 rows are to be split off, but" in found


def test_a_length_limit_below_every_prompt(check):
    (found,) = check("a.csv", "a,b\none two three four five,6\n", "training.max_length=3")
    assert "training.max_length: 3 is too small for the 1 rows of" in found


def test_no_machine_learning_library_is_imported():
    heavy = "('torch', 'transformers', 'datasets')"
    code = f"import sys, rankwise.data.local_check; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
