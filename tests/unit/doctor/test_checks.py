from __future__ import annotations

import time

import pytest

from rankwise.doctor.checks import CHECKS, run_checks, worst_state
from rankwise.doctor.finding import HealthCheck, HealthState, ok, problem, skipped, warning
from rankwise.exceptions import JobStoreError
from rankwise.settings import Settings


@pytest.fixture
def settings():
    return Settings.load()


def _raising(error):
    def look(settings):
        raise error

    return look


def test_checks_run_at_the_same_time_and_answer_in_their_order(settings):
    def slow(name):
        def look(settings):
            time.sleep(0.4)
            return [ok(name, "")]

        return look

    began = time.monotonic()
    found = run_checks(settings, [HealthCheck(name=str(index), run=slow(str(index))) for index in range(10)])
    assert time.monotonic() - began < 2.0
    assert [finding.name for finding in found] == [str(index) for index in range(10)]


def test_a_check_that_hangs_is_a_problem_and_does_not_delay_the_others(settings):
    hanging = HealthCheck(
        name="hangs", run=lambda settings: time.sleep(60) or [], timeout=0.3, timeout_advice="see the cable"
    )
    began = time.monotonic()
    found = run_checks(settings, [hanging, HealthCheck(name="fine", run=lambda settings: [ok("fine", "")])])
    assert time.monotonic() - began < 5
    assert [(each.name, each.state) for each in found] == [("hangs", HealthState.PROBLEM), ("fine", HealthState.OK)]
    assert found[0].seen == "no answer within 0.3 seconds"
    assert found[0].advice == "see the cable"


def test_a_user_fixable_error_is_a_problem_with_its_advice(settings):
    (found,) = run_checks(
        settings, [HealthCheck(name="q", run=_raising(JobStoreError("no table; run `rankwise db upgrade`")))]
    )
    assert (found.state, found.seen, found.advice) == (HealthState.PROBLEM, "no table", "run `rankwise db upgrade`")


def test_a_bug_in_a_check_is_a_problem_and_no_traceback(settings):
    (found,) = run_checks(settings, [HealthCheck(name="q", run=_raising(ZeroDivisionError("by zero")))])
    assert found.state is HealthState.PROBLEM
    assert found.seen == "the check itself failed: ZeroDivisionError: by zero"


def test_secrets_are_taken_out_of_what_the_doctor_says(settings):
    url = "postgresql://ann:pa55word@db/queue"
    findings = [problem("x", f"{url} refused", f"correct {url}"), warning("x", "token=abcdefgh12345678", "")]
    (raised,) = run_checks(settings, [HealthCheck(name="q", run=_raising(RuntimeError(url)))])
    for finding in [*findings, raised]:
        text = str(finding.to_json())
        assert "pa55word" not in text
        assert "abcdefgh12345678" not in text
        assert "[redacted]" in text


def test_what_another_program_said_over_several_lines_is_one_line():
    assert problem("x", "refused:\n\tIs the server running?", "").seen == "refused: Is the server running?"


def test_the_worst_finding_decides():
    assert worst_state([]) is HealthState.OK
    assert worst_state([ok("a", ""), skipped("b", "")]) is HealthState.OK
    assert worst_state([warning("a", "", ""), ok("b", ""), skipped("b", "")]) is HealthState.WARNING
    assert worst_state([warning("a", "", ""), problem("b", "", ""), ok("c", "")]) is HealthState.PROBLEM


def test_names_of_checks_are_unique():
    names = [check.name for check in CHECKS]
    assert len(names) == len(set(names))
