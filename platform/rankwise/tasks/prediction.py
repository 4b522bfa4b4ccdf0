"""What the row of a predict job says: some shards of an input to be answered, or the output to be put together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rankwise.assets.confine import confine
from rankwise.experiment.hashing import digest
from rankwise.inference.request import Request
from rankwise.inference.shards import Manifest, Parts, Stand
from rankwise.jobs.job import Job, JobKind, JobState, NewJob
from rankwise.jobs.store import JobStore
from rankwise.settings import Settings

_LONGEST = 255


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The work of a predict job.

    Attributes:
        whole: Names the prediction that it is a part of.
        span: Its shards, as (first, behind the last); None puts the output together.
        source: The input, as workers see it.
        output: Where the answers go, likewise.
        request: What is asked.
        manifest: What was resolved at submission: versions, digests of adapters and of the input.
        host: Where it was submitted.
    """

    whole: str
    span: tuple[int, int] | None
    source: Path
    output: Path
    request: Request
    manifest: Manifest
    host: str

    @classmethod
    def of(cls, job: Job) -> Self:
        """Read a job's row."""
        spec = job.spec
        return cls(
            whole=spec["whole"],
            span=None if spec["span"] is None else (spec["span"][0], spec["span"][1]),
            source=Path(spec["input"]),
            output=Path(spec["output"]),
            request=Request.of(spec["request"]),
            manifest=Manifest.of(spec["manifest"]),
            host=spec["host"],
        )

    @property
    def parts(self) -> Parts:
        """Where the answers are kept."""
        return Parts(self.output, self.whole)

    @property
    def rows(self) -> int:
        """How many rows the shards have; all of the input's for the job that puts the output together."""
        if self.span is None:
            return self.manifest.rows
        return sum(len(self.manifest.span(shard)) for shard in range(*self.span))

    @property
    def spec_hash(self) -> str:
        """Names the job."""
        return digest({"whole": self.whole, "span": self.span})

    @staticmethod
    def experiment_of(output: Path) -> str:
        """What the queue lists the jobs under."""
        return f"predict {output.name}"[:_LONGEST]

    def job(self, *, priority: int, after: tuple[int, ...] = ()) -> NewJob:
        """As the queue takes it."""
        spec: dict[str, Any] = {
            "whole": self.whole,
            "span": self.span,
            "input": str(self.source),
            "output": str(self.output),
            "request": self.request.to_json(),
            "manifest": self.manifest.to_json(),
            "host": self.host,
        }
        return NewJob(
            kind=JobKind.PREDICT,
            experiment=self.experiment_of(self.output),
            spec_hash=self.spec_hash,
            spec=spec,
            priority=priority,
            after=after,
        )


def jobs_of_prediction(queue: JobStore, output: Path, whole: str) -> list[Job]:
    """The jobs of a prediction, the one that puts the output together last."""
    experiment = Prediction.experiment_of(output)
    found: list[Job] = []
    last = 0
    while page := queue.jobs(experiment=experiment, kinds=[JobKind.PREDICT], after_id=last):
        found += [job for job in page if job.spec["whole"] == whole]
        last = page[-1].id
    return sorted(found, key=lambda job: (job.spec["span"] is None, job.id))


def confine_files(source: Path, output: Path, models: Iterable[str], settings: Settings) -> None:
    """Refuse files that this machine does not touch for others.

    Args:
        source: The input.
        output: The output.
        models: Resolved URIs; those that are absolute paths are directories.
        settings: With `RANKWISE_DATA_ROOT`, or without.

    Raises:
        ConfigError: One is outside of `RANKWISE_DATA_ROOT`.
    """
    directories = [Path(uri) for uri in models if uri.startswith("/")]
    for key, path in (("INPUT", source), ("OUTPUT", output), *(("--model", path) for path in directories)):
        confine(path, settings, key)


def stand_of(queue: JobStore, output: Path, whole: str) -> Stand:
    """How far the jobs of a prediction are; those that nobody has queued have ended."""
    jobs = jobs_of_prediction(queue, output, whole)
    if not all(job.ended for job in jobs):
        return Stand.OPEN
    return Stand.DONE if jobs and jobs[-1].state is JobState.SUCCEEDED else Stand.ENDED
