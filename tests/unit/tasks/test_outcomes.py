import pytest

from rankwise.exceptions import (
    AssetError,
    BaseMismatchError,
    ConfigError,
    DatasetError,
    JobStoreError,
    StorageError,
    TrackingError,
)
from rankwise.jobs.job import Outcome
from rankwise.tasks.outcomes import outcome_of


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
