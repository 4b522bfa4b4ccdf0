"""How arms are split into forward passes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.training.step import Passes


def split(passes, sizes):
    return list(passes.split(sizes, lambda size: size))


def test_one_part_is_one_pass():
    assert split(Passes(), [(1, 5), (2, 9)]) == [[(1, 5), (2, 9)]]


def test_parts_are_runs_of_one_length():
    assert [len(each) for each in split(Passes(parts=2), [(1, 1)] * 5)] == [3, 2]
    assert [len(each) for each in split(Passes(parts=4), [(1, 1)] * 3)] == [1, 1, 1]


def test_tokens_are_counted_with_their_padding():
    assert split(Passes(max_tokens=40), [(2, 10), (1, 11), (1, 10), (1, 20)]) == [
        [(2, 10), (1, 11)],
        [(1, 10), (1, 20)],
    ]


def test_an_arm_is_never_cut():
    assert split(Passes(max_tokens=10), [(8, 100), (1, 1)]) == [[(8, 100)], [(1, 1)]]


@given(
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 50)), min_size=1, max_size=12),
    st.integers(1, 12),
    st.none() | st.integers(1, 400),
)
def test_every_arm_is_in_one_pass_in_its_order_and_limits_hold(sizes, parts, limit):
    groups = split(Passes(parts=parts, max_tokens=limit), sizes)
    assert [size for group in groups for size in group] == sizes
    assert all(groups)
    if limit is None:
        assert len(groups) <= parts
        return
    for group in groups:
        assert len(group) == 1 or sum(rows for rows, _ in group) * max(length for _, length in group) <= limit


def test_after_running_out_of_memory_the_split_is_finer_down_to_single_arms():
    assert Passes(max_tokens=9).finer(8) == Passes(parts=2, max_tokens=9)
    assert Passes(parts=4).finer(5).parts == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [({"parts": 0}, "parts must be at least 1, got 0"), ({"max_tokens": 0}, "max_tokens must be at least 1 or None")],
)
def test_no_passes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Passes(**given)
