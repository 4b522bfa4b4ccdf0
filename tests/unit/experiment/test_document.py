from __future__ import annotations

import math

import pytest

from rankwise.experiment.document import MAX_NODES, Document, Problem, read_document, read_value
from rankwise.experiment.paths import dotted


def data_of(text: str):
    document, problems = read_document(text, "f.yaml")
    assert problems == []
    return document.data


def problems_of(text: str) -> list[tuple[int | None, str, str]]:
    return [(problem.line, dotted(problem.path), problem.text) for problem in read_document(text, "f.yaml")[1]]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-3", 0.002),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-7", -7),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("007", 7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
    ],
)
def test_plain_scalars_follow_the_core_schema_of_yaml_1_2(text, value):
    assert data_of(f"a: {text}")["a"] == value
    assert read_value(text) == value


@pytest.mark.parametrize(
    "text", ["on", "off", "yes", "no", "y", "N", "1_000", "0b11", "1:30", "2024-01-01", "2*r", "e3"]
)
def test_what_yaml_1_1_took_for_something_else_is_text(text):
    assert data_of(f"a: {text}")["a"] == text
    assert read_value(text) == text


def test_a_yaml_1_1_directive_does_not_bring_the_old_booleans_back():
    assert data_of("%YAML 1.1\n---\na: yes\n") == {"a": "yes"}


def test_nan_is_a_number_that_the_schema_can_refuse():
    assert math.isnan(read_value(".nan"))


def test_quoted_scalars_are_text():
    assert data_of("a: '1'\nb: \"true\"\nc: |\n  2\n") == {"a": "1", "b": "true", "c": "2\n"}


def test_an_endless_integer_is_no_integer():
    assert read_value("9" * 5000) == math.inf
    assert isinstance(read_value("0x" + "f" * 5000), str)


def test_lines_of_keys_and_items_are_known():
    document, _ = read_document("a:\n  b: 1\n  c: [x,\n    y]\nd: {e: 2}\n", "f.yaml")
    assert document.lines == {
        ("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 3, ("a", "c", 1): 4, ("d",): 5, ("d", "e"): 5,
    }  # fmt: skip
    assert document.line(("a", "missing", "deeper")) == 1
    assert document.line(("nowhere",)) == 1


def test_a_duplicate_key_is_an_error_on_its_second_line():
    assert problems_of("a: 1\nb:\n  c: 1\n  c: {d: 2}\na: 2\n") == [
        (4, "b.c", "is given twice, first on line 3; remove one"),
        (5, "a", "is given twice, first on line 1; remove one"),
    ]


def test_a_key_that_is_not_text_is_an_error():
    assert problems_of("a: 1\n2: 3\n") == [(2, "", "a key must be text, got 2")]


@pytest.mark.parametrize("text", ["a: !!float 1", "a: !!python/object:os.system {}", "a: !x [1]"])
def test_tags_are_refused(text):
    ((line, key, message),) = problems_of(text)
    assert (line, key) == (1, "a")
    assert message.endswith("tags are not allowed")


def test_an_alias_stands_for_its_value_and_is_a_copy():
    data = data_of("a: &x {b: [1]}\nc: *x\n")
    assert data["c"] == {"b": [1]}
    assert data["c"]["b"] is not data["a"]["b"]


def test_an_alias_inside_of_its_own_anchor_is_refused():
    assert problems_of("a: &x [*x]") == [(1, "a[0]", "the alias *x has no complete value before it")]


def test_an_alias_bomb_is_refused_before_it_unfolds():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for last, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{last}'] * 10)}]")
    ((line, key, message),) = problems_of("\n".join(lines))
    assert (line, key, message) == (5, "e[7]", f"expands to more than {MAX_NODES:,} values")


def test_deep_nesting_is_refused():
    ((_, _, message),) = problems_of("a: " + "[" * 1000 + "]" * 1000)
    assert message == "is nested deeper than 20 levels"


def test_a_large_file_is_refused():
    assert problems_of("a: " + "x" * 2**20) == [
        (1, "", "is larger than 1,048,576 bytes, so it is not an experiment file")
    ]


def test_a_second_document_is_refused():
    assert problems_of("a: 1\n---\nb: 2\n") == [(2, "", "starts a second document; a file must hold one")]


@pytest.mark.parametrize(
    ("text", "line"), [("a: [1,\nb: }", 2), ("a: 1\n\tb: 2", 2), ("a: 'x", 1), ("a: 1\nb: \x01", 1), ("a: b: c", 1)]
)
def test_what_is_not_yaml_is_said_with_its_line(text, line):
    ((found, key, message),) = problems_of(text)
    assert (found, key) == (line, "")
    assert message.startswith("is not YAML: ")
    assert "\n" not in message


@pytest.mark.parametrize("text", ["", "# nothing\n", "- 1\n", "text\n", "---\n"])
def test_anything_but_a_mapping_is_refused(text):
    assert problems_of(text) == [(1, "", "must be a mapping with the keys of an experiment")]


def test_an_override_is_one_value():
    assert read_value("[4, all-linear]") == [4, "all-linear"]
    with pytest.raises(ValueError, match="is not YAML"):
        read_value("[1")


def test_problems_are_reported_once_and_in_the_order_of_the_file():
    document = Document(filename="f.yaml", lines={("b",): 2, ("a",): 3, ("c",): None})
    problems = [
        Problem(path=("c",), text="three"),
        Problem(path=("a", 0, "x"), text="two"),
        Problem(path=("b",), text="one"),
        Problem(path=("b",), text="one"),
        Problem(path=(), text="first", line=1),
    ]
    assert document.report(problems) == (
        "f.yaml:1: first",
        "f.yaml:2: b: one",
        "f.yaml:3: a[0].x: two",
        "--set: c: three",
    )
    assert str(document.error(problems)).splitlines() == list(document.report(problems))
