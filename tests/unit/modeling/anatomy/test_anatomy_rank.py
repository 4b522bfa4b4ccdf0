import pytest

from rankwise.modeling.anatomy.anatomy import kept_energy, rank_of_energy, rank_use


def test_a_rank_of_which_an_eighth_is_used_is_named_with_the_one_that_would_do():
    use = rank_use([[3.0] * 6 + [0.01] * 58, [1.0, 1.0] + [0.0] * 62], r=64)
    assert (use.r, use.rank_99, use.least, use.most, use.enough) == (64, 6, 2, 6, 8)
    assert use.text == (
        "r = 64 is more than needed: rank 6 keeps 99 % of the energy of all deltas (single modules need 2 to 6); "
        "r = 8 would be enough"
    )


def test_a_rank_that_is_used_to_the_last_direction_is_called_used():
    use = rank_use([[2.0] * 8], r=8)
    assert (use.rank_99, use.enough) == (8, 8)
    assert use.text == "r = 8 is used: rank 8 keeps 99 % of the energy of all deltas (single modules need 8)"


def test_a_large_module_outweighs_a_small_one_that_needs_more():
    """The energy of all deltas counts, not the share of modules."""
    use = rank_use([[100.0, 0.0, 0.0, 0.0], [0.1] * 4], r=4)
    assert (use.rank_99, use.most, use.enough) == (1, 4, 1)


def test_the_next_power_of_two_never_exceeds_the_rank():
    assert rank_use([[1.0] * 9 + [0.0] * 3], r=12).enough == 12


@pytest.mark.parametrize("values", [[], [[]], [[0.0, 0.0]], [[0.0], []]])
def test_where_nothing_was_learned_there_is_no_answer(values):
    assert rank_use(values, r=8) is None


def test_modules_of_different_ranks_are_pooled():
    use = rank_use([[1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], r=4)
    assert (use.rank_99, use.least, use.most) == (4, 2, 4)


def test_kept_energy_ends_in_one_whatever_is_rounded():
    assert kept_energy([0.1] * 10)[-1] == 1.0
    assert kept_energy([3.0, 1.0]) == [0.75, 1.0]
    assert rank_of_energy([0.99, 0.01]) == 1
    assert rank_of_energy([0.98, 0.01, 0.01]) == 2
