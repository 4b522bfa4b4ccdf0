"""MLflow's plugin `run_context_provider`: tags on every run that is started inside a worker, by a user's code too.

A metric of another package, a callback, a program that a job starts: what begins an MLflow run with `mlflow.start_run`
while a worker does a job is found again by that job. MLflow loads this module whenever it is imported, so it imports
next to nothing.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from mlflow.tracking.context.abstract_context import RunContextProvider

from rankwise.settings import work_context


class WorkerContext(RunContextProvider):  # type: ignore[misc]
    """Job, attempt, worker and GPUs, while a worker does a job."""

    def in_context(self) -> bool:
        """Whether this process, or the one that started it, is a worker's child at work."""
        return bool(work_context())

    def tags(self) -> dict[str, str]:
        """`rankwise.job` and `rankwise.attempt` (of a pack, all of them), `rankwise.worker`, `.device` and `.gpus`."""
        context = work_context()
        # Where one job of a pack is worked on, the log knows which.
        bound = _bound()
        job = str(bound.get("job", context["job"]))
        attempt = str(bound.get("attempt", context["attempt"]))
        known = {"job": job, "attempt": attempt, "worker": context["worker"], "device": context.get("device", "")}
        return {f"rankwise.{key}": value for key, value in {**known, "gpus": _gpus()}.items() if value}


def _bound() -> dict[str, Any]:
    if "structlog" not in sys.modules:
        return {}
    from structlog.contextvars import get_contextvars

    return get_contextvars()


@functools.cache
def _gpus() -> str:
    from rankwise.tracking.provenance import gpus

    return "; ".join(gpus())
