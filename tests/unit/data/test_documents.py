import numpy as np
import pytest
from helpers.data_rows import QUICK, make_renderer, table
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.documents import windows
from rankwise.data.preflight import preflight
from rankwise.data.rows import Examples, build_examples
from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import DatasetSpec

RENDERER = make_renderer()
END = RENDERER.tokenizer.eos_token_id
TEXTS = ["carat 0.23, cut Ideal", "How much is this diamond?", "Price is $326", "a"]


def documents(texts):
    rows = table([{"text": text} for text in texts])
    return build_examples(DatasetSpec(train="x"), [rows], None, RENDERER).train


def stream(texts):
    return [token for ids in RENDERER.tokens(texts) for token in (*ids, END)]


@QUICK
@given(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=12), st.integers(2, 40))
def test_windows_are_the_stream_without_padding(texts, length):
    encoded = windows(documents(texts), RENDERER, length, joined=True)
    wanted = stream(texts)
    assert encoded.lengths[:-1].tolist() == [length] * (len(encoded) - 1)
    assert encoded.input_ids.tolist() == wanted[: encoded.tokens]
    assert len(wanted) - encoded.tokens in {0, 1}  # a window of one token has nothing to predict
    for row in encoded:
        assert row.supervised.tolist() == [False] + [True] * (len(row.input_ids) - 1)


def test_a_window_has_the_id_of_the_document_that_it_begins_in():
    first, second = RENDERER.tokens(TEXTS[:2])
    encoded = windows(documents(TEXTS[:2]), RENDERER, len(first) + 1, joined=True)
    assert encoded.ids[:2] == ("0", "1")
    assert set(windows(documents(TEXTS[:2]), RENDERER, len(first), joined=True).ids[:2]) == {"0"}
    assert encoded.whole_lengths.tolist() == [len(first) + 1, len(second) + 1]


def test_an_evaluated_document_has_windows_of_its_own_after_the_end_of_another():
    encoded = windows(documents(TEXTS), RENDERER, 10, joined=False)
    for index, ids in enumerate(RENDERER.tokens(TEXTS)):
        own = [row.input_ids.tolist() for row in encoded if row.id == str(index)]
        whole = [END, *ids, END]
        assert np.concatenate(own).tolist() == whole[: sum(map(len, own))]
        assert len(whole) - sum(map(len, own)) in {0, 1}


def test_documents_have_no_empty_answers_and_no_prompts_to_complain_about():
    rows = documents(TEXTS)
    encoded = windows(rows, RENDERER, 16, joined=True)
    report = preflight(Examples(train=rows, eval=[]), encoded, None, RENDERER)
    assert (report.errors, report.warnings) == ((), ())


def test_documents_on_both_sides_are_told():
    train, evaluation = documents(TEXTS), documents(["new", TEXTS[0] + " "])
    encoded = [windows(rows, RENDERER, 16, joined=False) for rows in (train, evaluation)]
    (warning,) = preflight(Examples(train=train, eval=evaluation), *encoded, RENDERER).warnings
    assert (warning.code, warning.rows) == ("shared_rows", ("1",))


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(DatasetError, match="joins documents with the end token"):
        windows(documents(TEXTS), make_renderer("{{ messages }}", eos_token=None), 8, joined=True)


def test_empty_documents_are_left_out_and_counted():
    rows = table([{"text": text} for text in ("x", "", None)])
    examples = build_examples(DatasetSpec(train="x"), [rows], None, RENDERER)
    assert len(examples.train) == 1
    assert examples.dropped == {"train: empty cell": 2}
