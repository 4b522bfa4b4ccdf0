from __future__ import annotations

import pytest

from rankwise.experiment.fields import (
    allowed,
    did_you_mean,
    get,
    inlined,
    is_sweepable,
    leaves,
    node_at,
    numbers,
    schema,
    show,
    sweepable,
    unknown_key,
)
from rankwise.experiment.paths import as_path


def test_every_field_has_words_for_what_it_allows():
    for path in leaves():
        words = allowed(as_path(path))
        assert words, path
        assert "^" not in words, (path, "a regular expression is no help")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("lora.r", "a whole number of at least 1"),
        ("lora.lora_dropout", "a number of at least 0 and less than 1"),
        ("training.max_steps", "a whole number of at least 1, or null"),
        ("sweep.trials", "a whole number of at least 1 and at most 1000, or null"),
        ("promotion.max_overlap", "a number of at least 0 and at most 1"),
        ("quantization.bnb_4bit_quant_type", "nf4 or fp4"),
        ("lora.use_rslora", "true or false"),
        ("version", "1"),
        ("lora", "a mapping with the keys r, lora_alpha, lora_dropout, target_modules, use_rslora"),
        ("register", "a mapping with the keys name, alias, checkpoint, or null"),
        ("evaluation.metrics", "a list (at least one), each item non-empty text"),
        ("nowhere.at.all", "something else"),
    ],
)
def test_words_come_from_the_schema(path, words):
    assert allowed(as_path(path)) == words


def test_numbers_are_where_expressions_may_stand():
    assert numbers()["lora.r"] == "integer"
    assert numbers()["training.learning_rate"] == "number"
    assert numbers()["dataset.eval.rows"] == "integer"
    assert "lora.target_modules" not in numbers()


def test_only_what_changes_an_arm_s_learning_can_be_swept():
    fields = sweepable()
    assert {"lora.r", "lora.target_modules", "training.learning_rate", "seed", "quantization.load_in_4bit"} <= set(
        fields
    )
    others = {
        "name",
        "base_model",
        "dataset.train_split",
        "dataset.eval.seed",
        "training.save_steps",
        "evaluation.metrics",
    }
    assert others.isdisjoint(fields)
    assert all(is_sweepable(path) for path in ("dataset.train", "dataset.train[0].weight", "dataset.train[12].source"))
    assert not any(
        is_sweepable(path) for path in ("dataset.train[0].format", "dataset.eval[0].rows", "dataset.train[]")
    )


def test_values_are_found_by_path_or_by_default():
    assert get({"lora": {"r": 4}}, ("lora", "r")) == 4
    assert get({"lora": {}}, ("lora", "lora_dropout")) == 0.0
    assert get({}, ("evaluation", "primary_metric")) == "eval.loss"
    with pytest.raises(KeyError, match=r"lora\.r"):
        get({"lora": {}}, ("lora", "r"))
    with pytest.raises(KeyError, match=r"lora\.r"):
        get({"lora": 3}, ("lora", "r"))


def test_near_misses_synonyms_and_keys_of_other_sections_are_suggested():
    assert did_you_mean("learnin_rate", ["learning_rate", "r"]) == "; did you mean 'learning_rate'?"
    assert did_you_mean("R", ["r", "lora_alpha"]) == "; did you mean 'r'?"
    assert did_you_mean("lr", ["learning_rate"]) == "; did you mean 'learning_rate'?"
    assert did_you_mean("zzz", ["learning_rate"]) == ""
    assert did_you_mean("max_steps", ["r"], leaves()) == "; did you mean training.max_steps?"
    assert (
        unknown_key(("register", "nam")) == "is not a key here; did you mean 'name'?; allowed: name, alias, checkpoint"
    )


def test_values_are_shown_as_in_yaml_and_shortened():
    assert show("a") == "'a'"
    assert show(True) == "true"
    assert show(None) == "null"
    assert show([1, "x"]) == '[1, "x"]'
    assert len(show("x" * 1000)) == 80


def test_the_schema_has_no_references_left():
    assert "$ref" not in str(schema())
    assert inlined({"$ref": "#/$defs/A", "description": "d"}, {"A": {"type": "object", "title": "A"}}) == {
        "type": "object",
        "description": "d",
    }


def test_nodes_are_found_through_alternatives_and_lists():
    assert node_at(("dataset", "eval", "rows"))["type"] == "integer"
    assert node_at(("evaluation", "metrics", 1))["examples"]
    assert node_at(("lora", "r", "x")) is None
