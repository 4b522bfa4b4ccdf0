from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.experiment.document import read_document, to_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
KEYS = st.text(min_size=1)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


def read(text: str):
    document, problems = read_document(text, "f.yaml")
    assert problems == [], text
    return document.data


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=4))
def test_whatever_is_written_reads_back_the_same(data):
    try:
        for_yaml = to_yaml(data)
        for_yaml.encode()
    except UnicodeEncodeError:
        return
    assert read(for_yaml) == data


def test_texts_that_look_like_something_else_are_quoted():
    data = {
        "a": "true",
        "b": "1e3",
        "c": "null",
        "d": "",
        "e": "x: y",
        "f": " x",
        "g": "é\u2028\U0001f600",
        "h": "a # b",
    }
    assert read(to_yaml(data)) == data
    assert 'a: "true"' in to_yaml(data)


def test_plain_words_and_nesting_stay_readable():
    assert to_yaml({"a": {"b": "all-linear", "c": []}, "d": [1, {"e": 2.5}], "f": {}}) == (
        "a:\n  b: all-linear\n  c: []\nd: [1, {e: 2.5}]\nf: {}\n"
    )
