from __future__ import annotations

import time

import pytest
import yaml

from rankwise.assets.guard import MAX_BYTES, read_yaml
from rankwise.exceptions import AdapterIntegrityError
from rankwise.flavor.fetch import read_mlmodel

LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


def test_ordinary_values_are_read():
    assert read_yaml("a: [1, 2.5, x]\nb: &b {c: null}\nd: *b\n") == {
        "a": [1, 2.5, "x"],
        "b": {"c": None},
        "d": {"c": None},
    }
    assert read_yaml("") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, "unfolds to more than"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 5_000, "nested too deeply"),
        ("x" * (MAX_BYTES + 1), "characters; allowed"),
        ("!!python/object/apply:os.system ['id']", "could not determine a constructor"),
        ("a: [", "expected the node content"),
        ("a: \x0b", "special characters are not allowed"),
        (f"a: {'9' * 10_000}", "Exceeds the limit"),
    ],
    ids=["laughs", "cycle", "depth", "size", "object", "syntax", "control", "number"],
)
def test_bombs_and_objects_are_refused_at_once(text, said):
    began = time.monotonic()
    with pytest.raises(ValueError, match=said):
        read_yaml(text)
    assert time.monotonic() - began < 10


def test_a_bomb_in_a_models_description_is_no_model(tmp_path):
    (tmp_path / "MLmodel").write_text(LAUGHS)
    with pytest.raises(AdapterIntegrityError, match="unfolds to more than"):
        read_mlmodel(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "yes", "017", "0o17", "1_000", "1:30", "2024-01-01", "1e-5", "a: &x {b: 1}\nc: {<<: *x}", "{a: 1, a: 2}",
        "{1: 2}", "!!binary aGk=",
    ],
)  # fmt: skip
def test_values_are_those_that_mlflow_and_datasets_see(text):
    assert read_yaml(text) == yaml.safe_load(text)
