import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.row_template import RowTemplate
from rankwise.data.values import Values, is_null
from rankwise.exceptions import DatasetError

ROW = {"carat": 0.23, "price": 326, "cut": "Ideal", "sold": datetime.date(2024, 5, 1), "table": 55.0}


def render(text):
    template = RowTemplate.parse(text, "dataset.prompt")
    template.check(ROW)
    return template.render(ROW, "7")


def test_columns_fill_their_places():
    assert render("carat {carat}, cut {cut}: ${price}") == "carat 0.23, cut Ideal: $326"


def test_format_specifications_apply():
    assert render("{price:.0f} {price:,} {carat:.1f} {cut:>6} {sold:%Y}") == "326 326 0.2  Ideal 2024"


def test_doubled_braces_are_literal():
    assert render("{{carat}} {carat}") == "{carat} 0.23"


def test_a_template_without_columns_is_a_text():
    assert render("hello") == "hello"


def test_values_are_not_templates():
    template = RowTemplate.parse("{cut}", "dataset.prompt")
    assert template.render({"cut": "{price}"}, "0") == "{price}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{karat}",
            "dataset.prompt: unknown column 'karat'; did you mean 'carat'? "
            "Available columns: carat, price, cut, sold, table",
        ),
        ("{Price}", "dataset.prompt: unknown column 'Price'; did you mean 'price'?"),
        ("{zzz}", "dataset.prompt: unknown column 'zzz'. Available columns: carat, price, cut, sold, table"),
        ("{price.real}", "attributes and indices of 'price' cannot be used, only whole columns"),
        ("{cut.__class__}", "attributes and indices of 'cut' cannot be used, only whole columns"),
        ("{cut[0]}", "attributes and indices of 'cut' cannot be used, only whole columns"),
        ("{cut!r}", "field {cut!r} is not allowed; allowed are names of columns"),
        ("{price:{table}}", "field {price:{table}} is not allowed"),
        ("{}", "field {} has no column name"),
        ("{0}", "field {0} has no column name"),
        ("{price", "is not a template: expected '}' before end of string; write {{ and }} for literal braces"),
        ("price}", "is not a template: Single '}' encountered"),
        (
            "{cut:.2f}",
            "dataset.prompt: field {cut:.2f} does not fit row 7: column 'cut' is 'Ideal', which is not a number",
        ),
        ("{price:.3}", "field {price:.3}: '.3' does not say what its precision is for: write .3g for digits"),
        ("{price:q}", "field {price:q}: 'q' is not a format specification"),
        ("{table:%Y}", "column 'table' is '55.0', which is not a date"),
        ("{carat:d}", "column 'carat' is 0.23, which is not a whole number"),
    ],
)
def test_wrong_templates_say_what_is_allowed(text, message):
    with pytest.raises(DatasetError) as raised:
        render(text)
    assert message in str(raised.value)


def test_columns_are_named_once_in_order():
    assert RowTemplate.parse("{b} {a} {b:>3}", "k").columns == ("b", "a")


def test_null_and_nan_are_missing_and_zero_is_not():
    assert [is_null(value) for value in (None, float("nan"), 0, "", 0.0, False)] == [True, True] + [False] * 4


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("{a}[[ in {b}]].", "1 in x."),
        ("{a}[[ in {empty}]].", "1."),
        ("[[{b}: ]]{a}[[ {b} and {empty}]]", "x: 1"),
        ("[[no column]] {a} [[[[{b}]]]]", "[[no column]] 1 [[x]]"),
    ],
)
def test_an_optional_part_is_left_out_where_a_column_of_it_is_empty(text, written):
    assert RowTemplate.parse(text, "k").render({"a": 1, "b": "x", "empty": None}, "0") == written


def test_rendering_1_reads_double_brackets_as_text():
    template = RowTemplate.parse("[[{a}]]", "k", Values(version=1))
    assert template.render({"a": True}, "0") == "[[True]]"


def test_missing_values_are_those_of_the_definition():
    template = RowTemplate.parse("{a} {b}", "k", Values(na_values=("NA", "-1")))
    assert [template.missing(row) for row in ({"a": "NA", "b": "x"}, {"a": 1, "b": -1}, {"a": "None", "b": ""})] == [
        "a",
        "b",
        None,
    ]
    assert RowTemplate.parse("{a}", "k").missing({"a": "NA"}) is None
    with pytest.raises(DatasetError, match="does not fit row 3: column 'a' has no value"):
        template.render({"a": None, "b": 1}, "3")


@pytest.mark.parametrize("value", [[1], {"role": "user"}, ("a",), b"x", object()])
def test_what_is_no_single_value_is_refused(value):
    with pytest.raises(DatasetError, match=r"column 'a' holds .*, of which a template makes no text; for a chat, set"):
        RowTemplate.parse("{a}", "k").render({"a": value}, "0")


@given(st.text(max_size=20))
def test_a_text_is_rendered_as_it_is(text):
    assert RowTemplate.parse("<{a}>", "k").render({"a": text}, "0") == f"<{text}>"


@pytest.mark.parametrize("spec", [">9999999999", ".9999999999f", "01000"])
def test_a_width_that_takes_the_memory_is_refused(spec):
    with pytest.raises(DatasetError, match="allowed are widths and precisions up to 999"):
        RowTemplate.parse(f"{{price:{spec}}}", "dataset.prompt")
