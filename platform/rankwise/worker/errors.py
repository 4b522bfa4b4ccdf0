"""A child's failure as an exception of the parent: the same class where it is one for people."""

from __future__ import annotations

import rankwise.exceptions
from rankwise.exceptions import JobError, RankwiseError
from rankwise.worker.conversation import INTERRUPTED
from rankwise.worker.protocol import Failure


def as_exception(failure: Failure) -> BaseException:
    """What to raise for a failure of the child.

    An error for people comes back as itself. A bug comes back as a `JobError` with the child's traceback, which is
    where it was.
    """
    if failure.type == INTERRUPTED:
        return KeyboardInterrupt()
    kind = getattr(rankwise.exceptions, failure.type, None)
    if isinstance(kind, type) and issubclass(kind, RankwiseError):
        return kind(failure.text)
    return JobError(f"{failure.text}\n{failure.trace}" if failure.trace else failure.text)
