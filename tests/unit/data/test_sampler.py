import numpy as np
import pytest
from helpers.data_rows import QUICK
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.batches import Sampler


def drawn(sampler, steps):
    return [index for step in range(steps) for index in sampler.indices(step)]


WHOLE = st.booleans()


@QUICK
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**40), WHOLE)
def test_every_epoch_is_a_permutation_and_no_row_is_skipped_between_epochs(count, batch_size, seed, whole):
    sampler = Sampler(count, batch_size, seed, whole_epochs=whole)
    rows = drawn(sampler, 3 * count)
    for epoch in range(len(rows) // count):
        part = rows[epoch * count : (epoch + 1) * count]
        assert sorted(part) == list(range(count))
        assert part == sampler.epoch(epoch)


@QUICK
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9), st.integers(0, 500), WHOLE)
def test_a_batch_is_a_pure_function_of_the_micro_step(count, batch_size, seed, step, whole):
    alone = Sampler(count, batch_size, seed, whole_epochs=whole).indices(step)
    sampler = Sampler(count, batch_size, seed, whole_epochs=whole)
    for other in (step + 3, 0, step // 2):
        sampler.indices(other)
    assert sampler.indices(step) == alone
    assert 1 <= len(alone) <= min(batch_size, count)
    assert whole or len(alone) == min(batch_size, count)


def test_a_batch_may_span_two_epochs_with_rendering_1():
    sampler = Sampler(5, 4, 0, whole_epochs=False)
    assert sampler.indices(1) == [sampler.epoch(0)[4], *sampler.epoch(1)[:3]]


@QUICK
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 5), st.booleans())
def test_every_epoch_is_a_whole_number_of_steps(count, batch_size, accumulation, grouped):
    sampler = Sampler(count, batch_size, 3, some_lengths(count) if grouped else None)
    steps = -(-sampler.batches // accumulation)
    for epoch in range(3):
        batches = [
            [sampler.indices(micro_step) for micro_step in sampler.micro_steps(epoch * steps + step, accumulation)]
            for step in range(steps)
        ]
        assert all(1 <= len(step) <= accumulation for step in batches)
        assert all(len(step) == accumulation for step in batches[:-1])
        assert sorted(row for step in batches for batch in step for row in batch) == list(range(count))
        sizes = [len(batch) for step in batches for batch in step]
        assert set(sizes[:-1]) <= {sampler.rows_per_batch}


def test_with_fewer_rows_than_a_batch_a_batch_is_one_epoch():
    sampler = Sampler(3, 8, 0)
    assert sampler.rows_per_batch == 3
    assert [sampler.indices(step) for step in range(2)] == [sampler.epoch(0), sampler.epoch(1)]


def test_seeds_and_epochs_differ():
    orders = {tuple(Sampler(50, 8, seed).epoch(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_does_not_change_between_versions_and_machines():
    assert Sampler(10, 4, 0).epoch(0) == [7, 6, 3, 5, 4, 1, 2, 8, 0, 9]
    assert Sampler(10, 4, 1).indices(3) == Sampler(10, 4, 1).epoch(1)[:4]
    assert Sampler(10, 4, 1, whole_epochs=False).indices(3) == [7, 6, 1, 8]


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
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9), WHOLE)
def test_grouped_by_length_every_row_still_comes_once_in_an_epoch(count, batch_size, seed, whole):
    sampler = Sampler(count, batch_size, seed, some_lengths(count), whole_epochs=whole)
    rows = drawn(sampler, 3 * count)
    for epoch in range(len(rows) // count):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))


@QUICK
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9), st.integers(0, 500), WHOLE)
def test_a_batch_grouped_by_length_is_a_pure_function_of_the_micro_step(count, batch_size, seed, step, whole):
    lengths = some_lengths(count)
    alone = Sampler(count, batch_size, seed, lengths, whole_epochs=whole).indices(step)
    sampler = Sampler(count, batch_size, seed, lengths, whole_epochs=whole)
    for other in (step + 3, 0, step // 2):
        sampler.indices(other)
    assert sampler.indices(step) == alone
    assert 1 <= len(alone) <= min(batch_size, count)


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
