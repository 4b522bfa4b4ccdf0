"""How an error that cut a job off is told to the queue and to people."""

from __future__ import annotations

import traceback

from rankwise.exceptions import RankwiseError
from rankwise.jobs.job import Outcome
from rankwise.worker.deaths import LESS_MEMORY
from rankwise.worker.protocol import Failure

_CONFIGURATION, _ENVIRONMENT = 2, 3
_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "cannot allocate memory")


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of an attempt that ended with an error.

    | error | outcome |
    |---|---|
    | an interruption | preempted: goes on later, counts as no failure |
    | the environment (disk, store, hub) | preempted: it is not the job's fault, and waits until that is mended |
    | the definition or the rows | fatal: trying again cannot help |
    | anything else, memory too | failed: tried again with backoff |
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return Outcome.PREEMPTED
    if isinstance(error, RankwiseError):
        return {_CONFIGURATION: Outcome.FATAL, _ENVIRONMENT: Outcome.PREEMPTED}.get(error.exit_code, Outcome.FAILED)
    return Outcome.FAILED


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was not enough, on the GPU or the host; torch says the latter with a plain RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _MEMORY_TEXTS)
    )


def text_of(error: BaseException) -> str:
    """An error in words: as it is where it is for people, with its kind where it is a bug, with advice for memory."""
    if isinstance(error, RankwiseError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory: {str(error).partition(chr(10))[0]}; {LESS_MEMORY}"
    return f"{type(error).__name__}: {error}"


def failure_of(error: BaseException) -> Failure:
    """An error as the parent is told of it."""
    outcome = outcome_of(error)
    interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
    for_people = interrupted or isinstance(error, RankwiseError) or is_out_of_memory(error)
    return Failure(
        outcome=str(outcome),
        type="KeyboardInterrupt" if interrupted else _public_name(error),
        text="interrupted" if interrupted else text_of(error),
        environment=isinstance(error, RankwiseError) and outcome is Outcome.PREEMPTED,
        trace=None if for_people else "".join(traceback.format_exception(error)),
    )


def _public_name(error: BaseException) -> str:
    """The class that the parent raises again: an error for people may be of a class that only its own package knows."""
    public = (each.__name__ for each in type(error).__mro__ if each.__module__ == RankwiseError.__module__)
    return next(public, type(error).__name__)
