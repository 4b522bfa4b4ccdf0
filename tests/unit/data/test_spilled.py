import pytest
from helpers.data_rows import COMPLETION, PROMPT
from helpers.tiny import make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data import rows as rows_module
from rankwise.data.rows import build_examples
from rankwise.data.spilled import Spilled
from rankwise.data.template import Renderer
from rankwise.data.tokens import encode, kept
from rankwise.experiment.schema import DatasetSpec


def spill(items, size, directory=None):
    """Items of which a text and the place are made again."""
    spilled = Spilled(lambda first, texts: [(first + at, text) for at, (text,) in enumerate(texts)], directory)
    for first in range(0, len(items), size):
        spilled.append([[text] for text in items[first : first + size]])
    return spilled


@given(st.lists(st.text(max_size=4), max_size=30), st.integers(1, 7))
def test_it_is_the_sequence_that_was_written(items, size):
    spilled = spill(items, size)
    items = list(enumerate(items))
    assert list(spilled) == items
    assert len(spilled) == len(items)
    assert [spilled[place] for place in reversed(range(len(items)))] == items[::-1]
    assert spilled[2:9] == items[2:9]
    assert spilled[-3:] == items[-3:]
    chosen = spilled.where(lambda item: item[1].isalpha())
    assert list(chosen) == [item for item in items if item[1].isalpha()]
    assert chosen[:2] == list(chosen)[:2]
    with pytest.raises(IndexError):
        spilled[len(items)]


def test_its_file_has_no_name_and_goes_away_with_it(tmp_path):
    spilled = spill(list("abcdefghij"), 3, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert "".join(text for _, text in spilled) == "abcdefghij"


def test_examples_of_long_tables_lie_on_the_disk_and_are_the_same(monkeypatch, tmp_path):
    import datasets

    table = datasets.Dataset.from_list(
        [{"carat": n / 10, "cut": "Ideal" * (1 + n % 9), "price": 7 * n} for n in range(25)]
    )
    renderer = Renderer.create(make_tokenizer())
    dataset = DatasetSpec(train="rows", prompt=PROMPT, completion=COMPLETION)

    def made():
        examples = build_examples(dataset, [table], None, renderer, scratch=tmp_path).train
        encoded = encode(examples, renderer, 40)
        return examples, encoded, [example.id for example in kept(examples, encoded)]

    in_memory, encoded, ids = made()
    monkeypatch.setattr(rows_module, "SPILLED_ROWS", 10)
    monkeypatch.setattr(rows_module, "READ_ROWS", 4)
    on_disk, encoded_too, ids_too = made()
    assert isinstance(on_disk, Spilled)
    assert list(on_disk) == in_memory
    assert encoded_too.digest == encoded.digest
    assert ids_too == ids
