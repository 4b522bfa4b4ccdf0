from __future__ import annotations

import time

import pytest
import yaml

from rankwise.assets.input_checks import MAX_BYTES, check_digest, read_source, read_yaml
from rankwise.exceptions import AdapterIntegrityError, AssetError, ConfigError
from rankwise.experiment.source import HubSource, LocalSource, PypiSource
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
        (LAUGHS, "expands to more than"),
        ("a: &a [*a]", "contains itself"),
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
    with pytest.raises(AdapterIntegrityError, match="expands to more than"):
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


ONE, TWO = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


def test_a_wrong_digest_names_both_and_the_ways_out():
    source = PypiSource("rows", "1.0", "rows/rows.csv")
    with pytest.raises(AssetError) as caught:
        check_digest(source, expected=ONE, actual=TWO, key="train_revision", hint="fetch it again")
    assert str(caught.value) == (
        f"wrong digest of pypi:rows==1.0#rows/rows.csv:\n  expected {ONE}\n  found    {TWO}\n"
        f"If the current content is what you want, write `train_revision: {TWO}`; otherwise fetch it again."
    )
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("expected", [None, ONE])
def test_a_right_digest_or_none_passes(expected):
    check_digest(LocalSource("./x"), expected=expected, actual=ONE, key="k", hint="h")


@pytest.mark.parametrize(
    ("text", "revision", "kind"),
    [
        ("org/name", None, HubSource),
        ("org/name", "main", HubSource),
        ("org/name", "a" * 40, HubSource),
        ("./dir", ONE, LocalSource),
        ("pypi:a==1#b.csv", ONE, PypiSource),
    ],
)
def test_a_source_and_its_revision_are_read(text, revision, kind):
    assert isinstance(read_source(text, revision, key="base_model_revision"), kind)


@pytest.mark.parametrize(
    ("text", "revision", "message"),
    [
        ("org/name/more", None, "^base_model: must be org/name"),
        ("org/name", ONE, "^base_model_revision: must be a commit"),
        ("./dir", "main", "^base_model_revision: must be 'sha256:'"),
        ("./dir", "1" * 64, "did you mean 'sha256:1111"),
    ],
)
def test_a_wrong_form_is_a_configuration_error(text, revision, message):
    with pytest.raises(ConfigError, match=message) as caught:
        read_source(text, revision, key="base_model_revision")
    assert caught.value.exit_code == 2
