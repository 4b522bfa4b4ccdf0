import datetime

import pytest

from rankwise.data.rows import RowTemplate, is_missing
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
            "dataset.prompt: field {cut:.2f} does not fit row 7, where cut is 'Ideal' (str): Unknown format code",
        ),
    ],
)
def test_wrong_templates_say_what_is_allowed(text, message):
    with pytest.raises(DatasetError) as raised:
        render(text)
    assert message in str(raised.value)


def test_columns_are_named_once_in_order():
    assert RowTemplate.parse("{b} {a} {b:>3}", "k").columns == ("b", "a")


def test_null_and_nan_are_missing_and_zero_is_not():
    assert [is_missing(value) for value in (None, float("nan"), 0, "", 0.0, False)] == [True, True] + [False] * 4


@pytest.mark.parametrize("spec", [">9999999999", ".9999999999f", "01000"])
def test_a_width_that_takes_the_memory_is_refused(spec):
    with pytest.raises(DatasetError, match="allowed are widths and precisions up to 999"):
        RowTemplate.parse(f"{{price:{spec}}}", "dataset.prompt")
