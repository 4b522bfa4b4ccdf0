import datetime
import decimal
import json
import uuid

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.tables import narrowed
from rankwise.data.values import CURRENT, ValueProblem, Values, formatted, is_null, text_of

ZONE = datetime.timezone(datetime.timedelta(hours=1))
STAMP = datetime.datetime.fromisoformat("2024-01-07T09:30")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("01067", "01067"),
        (" 5", " 5"),
        ("None", "None"),
        ("", ""),
        (True, "true"),
        (np.False_, "false"),
        (7, "7"),
        (-(2**70), "-1180591620717411303424"),
        (np.uint64(2**64 - 1), "18446744073709551615"),
        (1.0, "1.0"),
        (1e3, "1000.0"),
        (1e20, "1e+20"),
        (0.1, "0.1"),
        (float("inf"), "Infinity"),
        (np.float32(0.1), "0.1"),
        (np.float16(0.1), "0.1"),
        (np.float64(12.5), "12.5"),
        (datetime.date(2024, 1, 7), "2024-01-07"),
        (STAMP, "2024-01-07T09:30:00"),
        (STAMP.replace(microsecond=250_000, tzinfo=ZONE), "2024-01-07T09:30:00.250000+01:00"),
        (pd.Timestamp(STAMP), "2024-01-07T09:30:00"),
        (np.datetime64("2024-01-07"), "2024-01-07"),
        (np.datetime64("2024-01-07T09:30", "ns"), "2024-01-07T09:30:00"),
        (datetime.time(9, 30), "09:30:00"),
        (datetime.timedelta(days=1, hours=2), "1 day, 2:00:00"),
        (pd.Timedelta(days=1, hours=2), "1 day, 2:00:00"),
        (np.timedelta64(26, "h"), "1 day, 2:00:00"),
        (decimal.Decimal("1.50"), "1.50"),
        (uuid.UUID("12345678123456781234567812345678"), "12345678-1234-5678-1234-567812345678"),
        (np.array(3), "3"),
    ],
)
def test_the_text_of_a_value(value, text):
    assert text_of(value) == CURRENT.text(value) == text


@pytest.mark.parametrize(
    "value",
    [
        None,
        float("nan"),
        np.float32("nan"),
        np.array(None),
        pd.NA,
        pd.NaT,
        np.datetime64("NaT"),
        decimal.Decimal("NaN"),
    ],
)
def test_null_and_not_a_number_have_no_value(value):
    assert is_null(value)
    assert CURRENT.is_missing(value)
    with pytest.raises(ValueProblem, match="has no value"):
        CURRENT.text(value)


@pytest.mark.parametrize("value", ["", "NA", "None", "null", "n/a", "nan", "-", 0, False])
def test_words_and_zero_are_values(value):
    assert not CURRENT.is_missing(value)


def test_the_definition_says_which_texts_stand_for_nothing():
    values = Values(na_values=("NA", "-999"))
    assert [values.is_missing(value) for value in ("NA", "-999", -999, "na", "", ["NA"])] == [True] * 3 + [False] * 3
    assert not Values(version=1, na_values=("NA",)).is_missing("NA")


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        ("7", "05d", "00007"),
        (" 7 ", "05d", "00007"),
        (7, "05d", "00007"),
        (7.0, "05d", "00007"),
        ("7.0", "05d", "00007"),
        (decimal.Decimal("7.00"), "05d", "00007"),
        ("12.345", ".2f", "12.35"),
        (12.345, ".2f", "12.35"),
        (decimal.Decimal("12.345"), ".2f", "12.35"),
        ("1e3", ".1f", "1000.0"),
        ("1234567", ",", "1,234,567"),
        (1234567, ",", "1,234,567"),
        ("0.25", ".0%", "25%"),
        ("x", ">3", "  x"),
        (7, ">3", "  7"),
        (7, "3", "7  "),
        ("7", "3", "7  "),
        ("abcdef", ".3s", "abc"),
        ("2024-01-07", "%d.%m.%Y", "07.01.2024"),
        (datetime.date(2024, 1, 7), "%d.%m.%Y", "07.01.2024"),
        (pd.Timestamp(STAMP), "%H:%M", "09:30"),
        ("2024-01-07T09:30:00", "%H:%M", "09:30"),
    ],
)
def test_a_format_specification_parses_texts(value, spec, text):
    assert formatted(value, spec) == text


@pytest.mark.parametrize(
    ("value", "spec", "problem"),
    [
        ("red", "05d", "is 'red', which is not a number"),
        ("7.5", "d", "is 7.5, which is not a whole number"),
        (7.5, "d", "is 7.5, which is not a whole number"),
        ("1_000", "d", "is '1_000', which is not a number"),
        ("", ".2f", "is '', which is not a number"),
        (True, "d", "is 'true', which is not a number"),
        (float("inf"), "d", "is inf, which is not a whole number"),
        ("7", "%Y", "is '7', which is not a date in ISO 8601"),
        (7, "%Y", "is '7', which is not a date"),
        ([1], "d", "holds a list"),
        ("9" * 5000, "d", "Exceeds the limit"),
    ],
)
def test_what_does_not_fit_a_format_specification_is_refused(value, spec, problem):
    with pytest.raises(ValueProblem) as raised:
        formatted(value, spec)
    assert problem in str(raised.value)


@given(st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans())
def test_numbers_are_written_as_pythons_json_writes_them(number):
    assert text_of(number) == json.dumps(number)


@given(st.integers(-(10**15), 10**15) | st.floats(-1e15, 1e15).map(lambda number: round(number, 4)))
def test_a_number_and_its_text_are_formatted_equally(number):
    for spec in ("012.3f", ",.2f", "+.4e", ">20"):
        assert formatted(number, spec) == formatted(text_of(number), spec)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.none()))
def test_numbers_of_32_bits_have_their_own_shortest_digits(numbers):
    stored = pa.array(numbers, pa.float32())
    for value, number in zip(narrowed(stored.to_pylist(), stored.type), numbers, strict=True):
        assert value is None if number is None else float(text_of(value)) == pytest.approx(number, rel=1e-7, abs=1e-45)
        assert value is None or np.float32(text_of(value)) == np.float32(number)


def test_version_1_is_what_format_makes_of_a_value():
    first = Values(version=1)
    assert [first.text(value) for value in (True, None, STAMP, [1])] == ["True", "None", str(STAMP), "[1]"]
    with pytest.raises(ValueProblem, match=r"is 'x' \(str\): Unknown format code"):
        first.text("x", "d")
