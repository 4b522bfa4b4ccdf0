import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from rankwise.exceptions import BaseMismatchError
from rankwise.modeling.adapter import add_rows, check_indices, check_rows, rows_needed, token_indices


def model(rows, *, tied=False, bias=False):
    embedding = torch.nn.Embedding(rows, 4)
    return SimpleNamespace(
        get_input_embeddings=lambda: embedding,
        get_output_embeddings=lambda: torch.nn.Linear(4, rows, bias=bias),
        config=SimpleNamespace(tie_word_embeddings=tied),
    )


@pytest.fixture
def base(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 10}))
    return tmp_path


def lora(indices=None):
    return LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)


def test_an_embedding_of_the_bases_size_passes(base):
    check_rows(model(10), lora(), base)


@pytest.mark.parametrize("rows", [9, 11])
def test_another_number_of_rows_is_refused(base, rows):
    with pytest.raises(BaseMismatchError, match=f"has {rows} rows, but its base .* has 10"):
        check_rows(model(rows, tied=True), lora(), base)


def test_new_rows_that_are_all_stored_pass_where_the_head_is_tied(base):
    check_rows(model(12, tied=True), lora([10, 11]), base)


def test_a_new_row_that_is_not_stored_is_named(base):
    with pytest.raises(BaseMismatchError, match=r"\(1 of them, starting at 11\)"):
        check_rows(model(12, tied=True), lora([10]), base)


def test_rows_of_an_untied_head_must_be_stored_too(base):
    with pytest.raises(BaseMismatchError, match="new rows are not stored"):
        check_rows(model(12), lora([10, 11]), base)
    both = lora({"embed_tokens": [10, 11], "lm_head": [10, 11]})
    check_rows(model(12), both, base)
    with pytest.raises(BaseMismatchError, match=r"\(1 of them, starting at 11\)"):
        check_rows(model(12), lora({"embed_tokens": [10, 11], "lm_head": [10]}), base)
    with pytest.raises(BaseMismatchError, match="new rows are not stored"):
        check_rows(model(12, bias=True), both, base)


def test_stored_rows_beyond_the_embedding_are_refused():
    check_indices(model(10), lora([0, 9]))
    with pytest.raises(BaseMismatchError, match=r"rows for tokens \[10\]"):
        check_indices(model(10), lora({"embed_tokens": [9, 10]}))


def test_token_indices_are_those_of_every_embedding():
    assert sorted(token_indices(lora({"embed_tokens": [1, 2], "lm_head": [3]}))) == [1, 2, 3]
    assert list(token_indices(lora([4]))) == [4]
    assert list(token_indices(lora())) == []


def test_an_adapter_needs_the_rows_up_to_its_highest_and_never_fewer_than_its_base_has():
    assert rows_needed(lora([10, 11]), 10) == 12
    assert rows_needed(lora([3]), 10) == 10
    assert rows_needed(lora(), 10) == 10


def test_rows_that_are_not_all_brought_are_not_added():
    with pytest.raises(BaseMismatchError, match=r"rows for tokens up to 12, .* \(1 missing, starting at 11\)"):
        add_rows(model(10, tied=True), lora([10, 12]))
    assert not add_rows(model(10, tied=True), lora([9]))
