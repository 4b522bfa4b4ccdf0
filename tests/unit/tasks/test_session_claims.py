import time

import pytest

from rankwise.exceptions import JobStoreError
from rankwise.tasks.session import Claims
from rankwise.worker.heartbeat import lease_clock


class Queue:
    """Answers `holds` with what it is given, one after another."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def holds(self, token):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.setattr("rankwise.tasks.session._RETRY_S", 0.01)
    made = Claims()
    made.update({"t": lease_clock() + 0.3}, [], [])
    return made


def test_a_claim_is_confirmed_until_its_lease_is_over(claims):
    assert claims.confirmed("t")
    time.sleep(0.35)
    assert not claims.confirmed("t")
    assert claims.holds("t"), "nobody has said that it is lost"


def test_what_the_parent_says_counts(claims):
    claims.update({"t": lease_clock() + 60, "u": lease_clock() + 60}, lost=["t"], cancelled=["u"])
    assert not claims.holds("t")
    assert not claims.confirmed("t")
    assert claims.cancelled("u")
    assert not claims.holds("never claimed")


def test_the_queue_is_asked_before_anything_is_published(claims):
    assert claims.check("t", Queue(True))
    assert not claims.check("t", Queue(False))
    assert not claims.check("never claimed", Queue())


def test_an_outage_is_waited_for_while_the_lease_lasts(claims):
    assert claims.check("t", Queue(JobStoreError("away"), JobStoreError("away"), True))
    began = time.monotonic()
    assert not claims.check("t", Queue(*[JobStoreError("away")] * 1000))
    assert time.monotonic() - began < 5
