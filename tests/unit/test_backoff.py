from __future__ import annotations

import pytest

from rankwise.backoff import Backoff, delay_after


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_the_delay_grows_by_the_factor_up_to_the_longest(clock):
    backoff = Backoff(1.0, 20.0, factor=3.0, clock=clock)
    assert [backoff.fail() for _ in range(5)] == [1.0, 3.0, 9.0, 20.0, 20.0]
    assert backoff.delay == 20.0


def test_a_first_delay_above_the_longest_is_cut():
    assert delay_after(1, first=10.0, longest=5.0) == 5.0


def test_thousands_of_failures_are_no_overflow():
    assert delay_after(5000, first=10.0, longest=300.0) == 300.0


def test_nothing_is_waited_for_before_the_first_failure(clock):
    backoff = Backoff(1.0, 20.0, clock=clock)
    assert (backoff.delay, backoff.is_failing, backoff.is_due) == (0.0, False, True)


def test_a_try_is_due_when_the_delay_is_over(clock):
    backoff = Backoff(2.0, 20.0, clock=clock)
    backoff.fail()
    clock.now += 1.9
    assert not backoff.is_due
    clock.now += 0.1
    assert backoff.is_due


def test_a_restarted_delay_is_as_long_as_before(clock):
    backoff = Backoff(2.0, 20.0, clock=clock)
    backoff.fail()
    clock.now += 1.5
    backoff.restart()
    clock.now += 1.9
    assert not backoff.is_due
    clock.now += 0.1
    assert backoff.is_due
    assert backoff.fail() == 4.0


def test_a_success_starts_over(clock):
    backoff = Backoff(2.0, 20.0, give_up_after=5.0, clock=clock)
    backoff.fail()
    backoff.fail()
    backoff.reset()
    assert (backoff.delay, backoff.is_failing, backoff.is_due) == (0.0, False, True)
    clock.now += 10.0
    assert not backoff.is_exhausted
    assert backoff.fail() == 2.0
    assert not backoff.is_exhausted


def test_it_is_exhausted_when_it_fails_for_too_long(clock):
    backoff = Backoff(2.0, 20.0, give_up_after=5.0, clock=clock)
    backoff.fail()
    clock.now += 5.0
    backoff.fail()
    assert not backoff.is_exhausted
    clock.now += 0.1
    assert backoff.is_exhausted
