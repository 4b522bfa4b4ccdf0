import numpy as np
import pytest
import torch
from helpers.data_rows import ask, make_renderer

from rankwise.data.batches import collate
from rankwise.data.tokens import Encoded, encode

ROWS = [
    Encoded(id="a", input_ids=np.array([1, 2, 3], np.int32), supervised=np.array([False, True, True])),
    Encoded(id="b", input_ids=np.array([4, 5], np.int32), supervised=np.array([False, True])),
]


def test_rows_are_padded_on_the_right():
    batch = collate(ROWS, 9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.supervised.tolist() == [[False, True, True], [False, True, False]]
    assert (batch.lengths, batch.ids, batch.supervised_tokens) == ([3, 2], ["a", "b"], 3)
    assert (batch.input_ids.dtype, batch.attention_mask.dtype, batch.supervised.dtype) == (
        torch.int64,
        torch.int64,
        torch.bool,
    )


def test_rows_are_padded_on_the_left_for_generation():
    batch = collate(ROWS, 9, "left")
    assert batch.input_ids.tolist() == [[1, 2, 3], [9, 4, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert batch.supervised.tolist() == [[False, True, True], [False, False, True]]


def test_padding_with_the_end_token_does_not_unsupervise_the_real_one():
    renderer = make_renderer(pad_token="<|im_end|>")
    encoded = encode([ask(renderer, "a", "one"), ask(renderer, "a longer one", "326")], renderer, None)
    batch = collate(list(encoded), renderer.pad_token_id)
    assert renderer.pad_token_id == renderer.tokenizer.eos_token_id
    ends = batch.supervised & (batch.input_ids == renderer.pad_token_id)
    assert ends.sum(dim=1).tolist() == [1, 1]


def test_a_batch_does_not_share_memory_with_its_rows():
    batch = collate(ROWS, 9)
    batch.supervised[0, 1] = False
    assert ROWS[0].supervised[1]


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        collate([], 0)
