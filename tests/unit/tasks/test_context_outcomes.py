import pytest

from rankwise.exceptions import (
    AssetError,
    BaseMismatchError,
    ConfigError,
    DatasetError,
    JobError,
    JobStoreError,
    StorageError,
    TrackingError,
)
from rankwise.jobs.job import Outcome
from rankwise.tasks.context import failure_of, outcome_of
from rankwise.worker.child_client import as_exception


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KeyboardInterrupt(), Outcome.PREEMPTED),
        (StorageError("full"), Outcome.PREEMPTED),
        (TrackingError("away"), Outcome.PREEMPTED),
        (AssetError("away"), Outcome.PREEMPTED),
        (JobStoreError("away"), Outcome.PREEMPTED),
        (ConfigError("wrong"), Outcome.FATAL),
        (DatasetError("wrong"), Outcome.FATAL),
        (BaseMismatchError("another"), Outcome.FAILED),
        (ZeroDivisionError("a bug"), Outcome.FAILED),
    ],
)
def test_what_is_not_the_jobs_fault_counts_as_no_failure(error, outcome):
    assert outcome_of(error) is outcome


def test_a_lack_of_memory_counts_as_a_failure():
    assert failure_of(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")).outcome == Outcome.FAILED


def test_a_bug_keeps_its_traceback_and_a_message_for_people_does_not():
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError as error:
        failure = failure_of(error)
    assert failure.text == "ZeroDivisionError: a bug"
    assert "test_context_outcomes.py" in failure.trace
    assert not failure.environment
    told = failure_of(StorageError("the disk is full"))
    assert (told.environment, told.trace, told.text) == (True, None, "the disk is full")


@pytest.mark.parametrize("kind", [AssetError, type("HubIsAwayError", (AssetError,), {})])
def test_an_error_for_people_arrives_with_its_exit_code_also_where_a_package_has_refined_it(kind):
    arrived = as_exception(failure_of(kind("the hub is away")))
    assert type(arrived) is AssetError
    assert (str(arrived), arrived.exit_code) == ("the hub is away", 3)
    bug = as_exception(failure_of(ZeroDivisionError("a bug")))
    assert isinstance(bug, JobError)
    assert "ZeroDivisionError: a bug" in str(bug)
