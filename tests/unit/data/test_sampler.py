import numpy as np
import pytest
from helpers.data_rows import QUICK
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.batches import Sampler


def drawn(sampler, steps):
    return [index for step in range(steps) for index in sampler.indices(step)]


@QUICK
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**40))
def test_every_epoch_is_a_permutation_and_no_row_is_skipped_between_epochs(count, batch_size, seed):
    sampler = Sampler(count, batch_size, seed)
    rows = drawn(sampler, 3 * count)
    for epoch in range(len(rows) // count):
        part = rows[epoch * count : (epoch + 1) * count]
        assert sorted(part) == list(range(count))
        assert part == sampler.epoch(epoch)


@QUICK
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9), st.integers(0, 500))
def test_a_batch_is_a_pure_function_of_the_micro_step(count, batch_size, seed, step):
    alone = Sampler(count, batch_size, seed).indices(step)
    sampler = Sampler(count, batch_size, seed)
    for other in (step + 3, 0, step // 2):
        sampler.indices(other)
    assert sampler.indices(step) == alone
    assert len(alone) == min(batch_size, count)


def test_a_batch_may_span_two_epochs_so_that_all_are_full():
    sampler = Sampler(5, 4, 0)
    assert sampler.indices(1) == [sampler.epoch(0)[4], *sampler.epoch(1)[:3]]


def test_with_fewer_rows_than_a_batch_a_batch_is_one_epoch():
    sampler = Sampler(3, 8, 0)
    assert sampler.rows_per_batch == 3
    assert [sampler.indices(step) for step in range(2)] == [sampler.epoch(0), sampler.epoch(1)]


def test_seeds_and_epochs_differ():
    orders = {tuple(Sampler(50, 8, seed).epoch(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_does_not_change_between_versions_and_machines():
    assert Sampler(10, 4, 0).epoch(0) == [7, 6, 3, 5, 4, 1, 2, 8, 0, 9]
    assert Sampler(10, 4, 1).indices(3) == [7, 6, 1, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 4, 0), "at least 1 row, got count=0"), ((4, 0, 0), "batch_size >= 1, got 0")],
)
def test_nothing_to_draw_from_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampler(*arguments)


def test_a_negative_step_is_refused():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        Sampler(4, 2, 0).indices(-1)


def some_lengths(count, seed=0):
    return tuple(int(number) for number in np.random.default_rng(seed).integers(5, 200, size=count))


@QUICK
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9))
def test_grouped_by_length_every_row_still_comes_once_in_an_epoch(count, batch_size, seed):
    sampler = Sampler(count, batch_size, seed, some_lengths(count))
    rows = drawn(sampler, 3 * count)
    for epoch in range(len(rows) // count):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))


@QUICK
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9), st.integers(0, 500))
def test_a_batch_grouped_by_length_is_a_pure_function_of_the_micro_step(count, batch_size, seed, step):
    lengths = some_lengths(count)
    alone = Sampler(count, batch_size, seed, lengths).indices(step)
    sampler = Sampler(count, batch_size, seed, lengths)
    for other in (step + 3, 0, step // 2):
        sampler.indices(other)
    assert sampler.indices(step) == alone
    assert len(alone) == min(batch_size, count)


def padding(batches, lengths):
    """Share of a batch that is padding, over all batches."""
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return 1 - sum(lengths[row] for batch in batches for row in batch) / padded


def test_grouping_by_length_saves_most_of_the_padding_of_an_arm_and_of_a_pack():
    lengths = some_lengths(1000)
    alone = {}
    together = {}
    for grouped in (False, True):
        samplers = [Sampler(1000, 4, seed, lengths if grouped else None) for seed in range(8)]
        alone[grouped] = padding([samplers[0].indices(step) for step in range(250)], lengths)
        packs = [[row for each in samplers for row in each.indices(step)] for step in range(250)]
        together[grouped] = padding(packs, lengths)
    assert alone[False] > 0.3
    assert alone[True] < 0.03
    assert together[False] > 0.4
    assert together[True] < 0.12


def test_seeds_have_other_rows_in_other_batches_also_when_grouped():
    lengths = some_lengths(100)
    first = {frozenset(Sampler(100, 4, 0, lengths).indices(step)) for step in range(25)}
    second = {frozenset(Sampler(100, 4, 1, lengths).indices(step)) for step in range(25)}
    assert len(first & second) < 5


def test_lengths_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="A sampler of 4 rows needs as many lengths, got 3"):
        Sampler(4, 2, 0, (1, 2, 3))
