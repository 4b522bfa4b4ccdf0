"""MLflow plugin `run_context_provider`: tags runs started inside a worker with their job, in users' code too.

MLflow loads this module on import, so it imports almost nothing itself.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from mlflow.tracking.context.abstract_context import RunContextProvider

from rankwise.settings import work_context


class WorkerContext(RunContextProvider):  # type: ignore[misc]
    """Tags with job, attempt, worker and GPUs while a worker runs a job."""

    def in_context(self) -> bool:
        """Return whether this process, or one of its parents, runs a worker's job."""
        return bool(work_context())

    def tags(self) -> dict[str, str]:
        """Return `rankwise.job` and `rankwise.attempt` (all of a pack), `rankwise.worker`, `.device` and `.gpus`."""
        context = work_context()
        # While one job of a pack is processed, the log context names it.
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
