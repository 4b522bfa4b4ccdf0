"""Results on disk, one file for each claim: what a child made outlives it.

    HOME/results/<token>.json   {"version": 1, "token": ..., "outcome": ..., "result": {...} or null, "error": ...}

The child writes the file, whole, before it says so; the parent tells the queue and removes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.exceptions import JobError
from rankwise.jobs.job import Outcome
from rankwise.settings import write_atomically

FORMAT_VERSION = 1
_LEFT_S = 7 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """How one claim ended.

    Attributes:
        token: The claim.
        outcome: What the queue is told.
        result: Stored in the job's row.
        error: Why it failed, for a person.
    """

    token: str
    outcome: Outcome
    result: Mapping[str, Any] | None = None
    error: str | None = None


class Results:
    """The files in a directory."""

    def __init__(self, directory: Path) -> None:
        """Use `HOME/results`."""
        self._directory = directory

    def path(self, token: str) -> Path:
        """Where the file of a claim is."""
        return self._directory / f"{token}.json"

    def write(self, result: Result) -> Path:
        """Store a result.

        Raises:
            StorageError: The disk is full or not writable.
        """
        document = {"version": FORMAT_VERSION, **asdict(result)}
        write_atomically(self.path(result.token), (json.dumps(document, indent=1) + "\n").encode())
        return self.path(result.token)

    def read(self, token: str) -> Result | None:
        """A stored result; None if there is none.

        Raises:
            JobError: Another release wrote the file.
        """
        try:
            document = json.loads(self.path(token).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if document.pop("version") != FORMAT_VERSION:
            raise JobError(f"{self.path(token)} was written by another release: finish with that one, or remove it")
        return Result(**{**document, "outcome": Outcome(document["outcome"])})

    def sweep(self) -> None:
        """Remove what workers that have died left behind: another attempt has long made its own."""
        for path in self._directory.glob("*.json"):
            try:
                if time.time() - path.stat().st_mtime > _LEFT_S:
                    path.unlink()
            except FileNotFoundError:
                continue

    def remove(self, token: str) -> None:
        """Forget a result that the queue knows, or that nobody may publish."""
        self.path(token).unlink(missing_ok=True)
