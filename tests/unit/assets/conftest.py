from contextlib import contextmanager

import pytest


class Recorder:
    """A progress that remembers what was done of what: by description (done, total, unit)."""

    def __init__(self):
        self.done = {}

    @contextmanager
    def task(self, description, total, unit="B"):
        amount = [0]

        def advance(more):
            amount[0] += more

        yield advance
        self.done[description] = (amount[0], total, unit)


@pytest.fixture
def recorder():
    return Recorder()
