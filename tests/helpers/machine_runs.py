"""How long the queue's state machine runs: a little in every test run, much under `make faults`."""

from __future__ import annotations

from functools import partial

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from helpers.queue_machine import LIMITS, QueueMachine
from helpers.stopped_clock import Clock, stopped_clock
from rankwise.jobs.store import JobStore

COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None, "print_blob": True}
SHORT = settings(max_examples=6, stateful_step_count=25, derandomize=True, **COMMON)
LONG = settings(max_examples=150, stateful_step_count=50, derandomize=False, **COMMON)


def run_machine(url: str, lock, profile: settings) -> None:
    """Run the machine on a database."""
    with stopped_clock():
        JobStore(url, lock=lock).close()
        clock = Clock(url)
        store = JobStore(url, lock=lock, limits=LIMITS)
        try:
            run_state_machine_as_test(partial(QueueMachine, store, clock, url), settings=profile)
        finally:
            store.close()
            clock.close()
