import pytest
from helpers.data_rows import QUICK
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.selection import choose, split_groups
from rankwise.exceptions import DatasetError

groups_of_rows = st.lists(st.sampled_from("abcdefghijklmnop"), min_size=20, max_size=80)


@QUICK
@given(groups_of_rows, st.integers(1, 5), st.integers(0, 9))
def test_no_group_lies_on_both_sides_and_no_row_is_lost(groups, rows, seed):
    try:
        split = split_groups(groups, rows, seed)
    except DatasetError:
        assert len(set(groups)) < 7
        return
    assert len(split.eval) == rows
    assert split.train
    assert {groups[row] for row in split.train}.isdisjoint(groups[row] for row in split.eval)
    assert sorted(split.train + split.eval + split.left_out) == list(range(len(groups)))
    # Only the last group that was taken gives up rows.
    assert len({groups[row] for row in split.left_out}) <= 1


@QUICK
@given(groups_of_rows, st.integers(0, 9), st.randoms())
def test_the_order_of_rows_does_not_decide_the_side_of_a_group(groups, seed, random):
    shuffled = list(groups)
    random.shuffle(shuffled)
    sides = []
    for each in (groups, shuffled):
        try:
            sides.append({each[row] for row in split_groups(each, 3, seed).train})
        except DatasetError:
            sides.append(None)
    assert sides[0] == sides[1]


def test_rows_of_new_groups_move_few_rows():
    groups = [f"group {row}" for row in range(1000)]
    before = split_groups(groups, 100, 0)
    after = split_groups([*groups, *(f"new {row}" for row in range(100))], 100, 0)
    assert len(set(before.eval) & set(after.eval)) > 80


def test_seeds_give_other_splits():
    groups = [str(row) for row in range(200)]
    assert split_groups(groups, 20, 0).eval != split_groups(groups, 20, 1).eval


def test_the_split_does_not_change_between_versions():
    assert split_groups([f"prompt {row}" for row in range(12)], 4, 0).eval == [3, 4, 7, 9]


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(DatasetError) as raised:
        split_groups(["a"] * 90 + ["b"] * 10, 95, 0)
    assert "rows is 95, but the table has 100 rows with 2 different prompts" in str(raised.value)


def test_a_limit_keeps_the_order_and_a_larger_one_keeps_the_rows():
    ids = [str(row) for row in range(100)]
    small, large = choose(ids, 10, 0, "train"), choose(ids, 30, 0, "train")
    assert len(small) == 10
    assert small == sorted(small)
    assert set(small) < set(large)
    assert choose(ids, 10, 1, "train") != small


def test_a_limit_is_no_bound_below_the_rows_there_are():
    assert choose(["a", "b"], 5, 0, "train") == choose(["a", "b"], None, 0, "train") == [0, 1]
