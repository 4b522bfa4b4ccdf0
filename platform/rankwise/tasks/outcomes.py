"""How an error that cut a job off is told to the queue."""

from __future__ import annotations

from rankwise.exceptions import RankwiseError
from rankwise.jobs.job import Outcome

_CONFIGURATION, _ENVIRONMENT = 2, 3


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of an attempt that ended with an error.

    | error | outcome |
    |---|---|
    | an interruption | preempted: goes on later, counts as no failure |
    | the environment (disk, store, hub) | preempted: it is not the job's fault, and waits until that is mended |
    | the definition or the rows | fatal: trying again cannot help |
    | anything else | failed: tried again with backoff |
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return Outcome.PREEMPTED
    if isinstance(error, RankwiseError):
        return {_CONFIGURATION: Outcome.FATAL, _ENVIRONMENT: Outcome.PREEMPTED}.get(error.exit_code, Outcome.FAILED)
    return Outcome.FAILED
