from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.experiment.expressions import Expression, ExpressionError

VALUES = {"r": 8, "lora.r": 8, "seed": 0, "rate": 0.5, "modules": ["q_proj", "v_proj"], "kind": "all-linear"}


def value(text: str, condition: bool = False):
    return Expression.parse(text, condition=condition).evaluate(VALUES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2*r", 16),
        ("2 * lora.r + 1", 17),
        ("r / 2", 4.0),
        ("r // 3", 2),
        ("r % 3", 2),
        ("r ** 2", 64),
        ("2 ** -1", 0.5),
        ("-r", -8),
        ("+r", 8),
        ("min(r, 4)", 4),
        ("max(r, 4, 16)", 16),
        ("round(r / 3)", 3),
        ("round(rate, 2)", 0.5),
        ("sqrt(r * 2)", 4.0),
        ("abs(-r)", 8),
        ("1e-4 * r", 8e-4),
        (" ( r ) ", 8),
    ],
)
def test_arithmetic_is_python_s(text, expected):
    assert value(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("r <= 16", True),
        ("4 < r < 8", False),
        ("r == 8 and seed == 0", True),
        ("not (r > 4 or seed)", False),
        ("kind == 'all-linear'", True),
        ("'q_proj' in modules", True),
        ("r in [2, 4, 16]", False),
        ("r not in (2, 4)", True),
        ("kind != 'x' and 2*r >= 16", True),
        ("True", True),
    ],
)
def test_conditions_compare_and_combine(text, expected):
    assert value(text, condition=True) is expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "(r).bit_length()",
        "eval('1')",
        "[x for x in y]",
        "lambda: 1",
        "r if r else 2",
        "f'{r}'",
        "'a' * 3",
        "r[0]",
        "r[0].x",
        "{1: 2}",
        "(x := 1)",
        "r & 1",
        "1 << 999999999",
        "min(*modules)",
        "min(a=1)",
        "min()",
        "1j",
        "...",
        "b'x'",
        "None",
        "r < 3",
        "True",
        "sqrt(1, 2)",
    ],
)
def test_anything_else_is_refused_in_arithmetic(text):
    with pytest.raises(ExpressionError) as caught:
        Expression.parse(text)
    assert "comparisons" not in str(caught.value)


def test_attribute_access_is_a_name_of_a_field_and_nothing_more():
    assert Expression.parse("r.__class__").names == ("r.__class__",)


@pytest.mark.parametrize("text", ["lambda: 1", "r if r else 2", "open('x')", "modules[0]", "f'{r}'", "None", "r is r"])
def test_conditions_have_no_way_out_either(text):
    with pytest.raises(ExpressionError, match=r"allowed are numbers, .*, comparisons, and, or, not, in"):
        Expression.parse(text, condition=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "division by zero"),
        ("9**9**9", "the result is out of range"),
        ("(2**1000)*(2**1000)", "the result is out of range"),
        ("2.0**10000", "the result is out of range"),
        ("(0-8)**0.5", "the result is not a finite number"),
        ("sqrt(0-1)", "the result is out of range"),
        ("1e308 * 10", "the result is not a finite number"),
        ("2 * kind", "the types do not fit (arithmetic with 'all-linear')"),
        ("-kind", "the types do not fit (arithmetic with 'all-linear')"),
    ],
)
def test_what_cannot_be_computed_is_said(text, message):
    with pytest.raises(ExpressionError) as caught:
        value(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ["", "2r", "1 +", "2*r; 3", "a = 1", "\x00", "(" * 250])
def test_syntax_errors_say_what_is_allowed(text):
    with pytest.raises(ExpressionError, match="syntax; allowed are numbers, names of fields"):
        Expression.parse(text)


def test_long_and_large_expressions_are_refused():
    with pytest.raises(ExpressionError, match="longer than 300 characters"):
        Expression.parse("1+" * 200 + "1")
    with pytest.raises(ExpressionError, match="more than 100 parts"):
        Expression.parse("1+" * 60 + "1")


def test_names_are_listed_once_each():
    assert Expression.parse("r * training.max_steps + r - min(seed, 2)").names == ("r", "training.max_steps", "seed")


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_computed_or_refused_but_never_crashes(text):
    try:
        expression = Expression.parse(text, condition=True)
        expression.evaluate(dict.fromkeys(expression.names, 3))
    except ExpressionError:
        pass


@settings(max_examples=50, deadline=None)
@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(1, 50), st.sampled_from(["+", "-", "*", "//", "%", "/"]))
def test_two_operations_agree_with_python(a, b, c, operation):
    text = f"(a + b) {operation} c"
    expected = eval(text, {}, {"a": a, "b": b, "c": c})
    assert Expression.parse(text).evaluate({"a": a, "b": b, "c": c}) == expected
