import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.exceptions import DatasetError
from rankwise.experiment.mixture import apportion, epoch_rows, evaluation_rows
from rankwise.experiment.schema import DataSource


def sources(*given):
    return [DataSource(source=f"{place}.jsonl", **keys) for place, keys in enumerate(given)]


@given(st.integers(0, 10_000), st.lists(st.floats(0.01, 1e6), min_size=1, max_size=8))
def test_whole_numbers_sum_to_the_total_and_are_near_their_shares(total, weights):
    counts = apportion(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6


def test_without_weights_every_row_is_taken_once():
    assert epoch_rows(sources({}, {}), [10, 30], None) == (10, 30)
    assert epoch_rows(sources({}, {"rows": 50}), [10, 30], None) == (10, 50)


def test_weights_share_out_the_rows_that_the_weighted_sources_have_together():
    assert epoch_rows(sources({"weight": 3}, {"weight": 1}), [10, 30], None) == (30, 10)
    assert epoch_rows(sources({"weight": 6}, {"weight": 2}), [10, 30], None) == (30, 10)
    assert epoch_rows(sources({"weight": 1}, {"weight": 1}, {"rows": 7}), [10, 31, 3], None) == (21, 20, 7)


def test_a_limit_is_shared_out_too():
    assert epoch_rows(sources({"weight": 3}, {"weight": 1}), [10, 30], 8) == (6, 2)
    assert epoch_rows(sources({"weight": 3}, {"weight": 1}, {"rows": 4}), [10, 30, 9], 8) == (3, 1, 4)
    assert epoch_rows(sources({"weight": 3}, {"weight": 1}), [10, 30], 1000) == (30, 10)
    with pytest.raises(DatasetError, match=r"dataset\.limit\.train is 4, but the sources with a number of rows have 4"):
        epoch_rows(sources({"weight": 3}, {"rows": 4}), [10, 9], 4)


def test_a_source_that_would_give_nothing_is_refused():
    with pytest.raises(
        DatasetError, match=r"dataset\.train\[1\] \(1\): the weight 0\.001 gives it none of the 40 rows"
    ):
        epoch_rows(sources({"weight": 1}, {"weight": 0.001}), [10, 30], None)


def test_evaluation_rows_are_shared_out_by_the_size_of_the_sources():
    assert evaluation_rows([100, 300], 40) == [11, 29]
    assert evaluation_rows([1000, 1], 10) == [9, 1]
    assert sum(evaluation_rows([5, 5, 5], 2)) == 2
