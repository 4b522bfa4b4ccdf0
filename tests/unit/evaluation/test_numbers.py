from __future__ import annotations

import time

import pytest

from rankwise.evaluation.metrics import parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Price is $326", 326.0),
        ("Price is $1,234.50", 1234.5),
        ("Price is $12,345,678", 12345678.0),
        ("about 1234", 1234.0),
        ("$ 99", 99.0),
        ("€5.5", 5.5),
        ("The 0.23 carat diamond costs $326.", 326.0),
        ("-$5", -5.0),
        ("$-5", -5.0),
        ("it fell by -3.5 %", -3.5),
        ("\u22123", -3.0),
        ("10-20", 10.0),
        ("A-4", 4.0),
        (".5", 0.5),
        ("2e3", 2000.0),
        ("3,5", 3.0),
        ("1,2345", 1.0),
        ("$326.", 326.0),
        ("326<|im_end|>", 326.0),
        ("$0", 0.0),
    ],
)
def test_a_number_is_read_as_it_is_meant(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize("text", ["", "no idea", "$", "$,", "inf", "nan", "9" * 400, "1e999", "\u0661\u0662"])
def test_a_text_without_a_finite_number_gives_none(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "1,111" * 40_000,
        "$" * 200_000,
        "$ " * 100_000,
        "-" * 200_000,
        "1," * 100_000,
        "1." * 100_000,
        "$1,111,11" * 20_000,
    ],
)
def test_no_answer_takes_long_to_read(text):
    began = time.perf_counter()
    parse_number(text)
    assert time.perf_counter() - began < 1
