from __future__ import annotations

import pytest
from torch import nn

from rankwise.modeling.lora.packed import Segment, evaluating, segments_of


def model_with(*adapters: str) -> nn.Module:
    model = nn.Linear(1, 1)
    model.peft_config = dict.fromkeys(adapters)
    return model


def test_neighbouring_rows_of_one_adapter_are_one_segment_as_long_as_its_longest_row():
    segments = segments_of(model_with("a", "b"), [None, "a", "a", "b"], [3, 5, 9, 2])
    assert segments == [
        Segment(adapter=None, start=0, stop=1, length=3),
        Segment(adapter="a", start=1, stop=3, length=9),
        Segment(adapter="b", start=3, stop=4, length=2),
    ]


def test_without_lengths_all_positions_count():
    assert segments_of(model_with("a"), ["a", "a"]) == [Segment(adapter="a", start=0, stop=2)]
    assert segments_of(nn.Linear(1, 1), [None]) == [Segment(adapter=None, start=0, stop=1)]
    assert segments_of(nn.Linear(1, 1), []) == []


def test_an_adapter_that_is_not_attached_is_refused():
    with pytest.raises(ValueError, match="the model has no adapter x, y; it has a"):
        segments_of(model_with("a"), ["y", "a", "x", None])
    with pytest.raises(ValueError, match="the model has no adapter x; it has none"):
        segments_of(nn.Linear(1, 1), ["x"])


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_given_back_in_the_mode_that_it_was_in(training):
    model = nn.Linear(1, 1).train(training)

    def fail():
        with evaluating(model):
            assert not model.training
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert model.training == training
