"""From `rankwise predict --submit` to jobs: one for each range of shards, and one that puts the output together.

The directory `OUTPUT.parts` belongs to the jobs from then on. The same command again finds the same jobs; those that
had failed or were cancelled are tried again.

- What the row of a predict job says: some shards of an input to be answered, or the output to be put together.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from rankwise.assets.guard import confine
from rankwise.digests import file_digest
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import digest
from rankwise.inference.predict import check_paths, check_unchanged, new_manifest
from rankwise.inference.shards import Manifest, Parts, Queued, Request, Stand
from rankwise.jobs.job import Job, JobKind, JobState, NewJob
from rankwise.jobs.store import JobStore
from rankwise.settings import Settings
from rankwise.tasks.context import Context

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


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What a submission has come to.

    Attributes:
        jobs: All jobs of the prediction as they now stand; the last one puts the output together.
        manifest: What was resolved.
        done: Whether the output is there already, made by these jobs.
    """

    jobs: tuple[Job, ...]
    manifest: Manifest
    done: bool = False


def submit_prediction(
    context: Context,
    request: Request,
    source: Path,
    output: Path,
    *,
    shards: int,
    priority: int = 0,
    overwrite: bool = False,
    restart: bool = False,
) -> Submission:
    """Queue a prediction; what a local command has begun is gone on with.

    Args:
        context: The stores.
        request: What is asked; its `device` is the workers' to choose.
        source: The input, which the workers must see under this path.
        output: Where the answers go, likewise.
        shards: Into how many jobs the rows are split, at most.
        priority: The higher one is claimed first.
        overwrite: Replace an output that is there.
        restart: Throw away what was begun, and cancel its jobs.

    Raises:
        ConfigError: The request, or what was begun, does not fit; the output is there already; a file is outside of
            `RANKWISE_DATA_ROOT`.
        AssetError: The input cannot be read.
        TrackingError: The registry cannot be reached.
    """
    source, output = source.absolute(), output.absolute()
    check_paths(source, output)
    # What workers with the same roots would refuse later.
    confine_files(source, output, (), context.settings)
    input_digest = file_digest(source, context.settings, progress=context.voice)
    parts = Parts(output)
    with parts.held():
        queued = parts.queued()
        if queued is not None and restart:
            _cancel(context, jobs_of_prediction(context.queue, output, queued.whole))
        anew = restart or (queued is not None and _is_done(context, queued))
        known = None if anew else parts.manifest()
        if known is None:
            # Without a manifest nothing says what the shards in a directory answer.
            parts.remove()
        if known is not None:
            check_unchanged(known, request, input_digest, parts)
        uri, voice = context.settings.tracking_uri, context.voice
        manifest = known or new_manifest(request, source, output, input_digest, uri, voice)
        confine_files(source, output, manifest.models.values(), context.settings)
        if manifest.queued is None:
            whole, before = _name(context, manifest, source, output)
            if before and not overwrite and not restart and _is_there(context, output, before[-1]):
                parts.remove()
                return Submission(jobs=tuple(before), manifest=manifest, done=True)
            if known is None and output.exists() and not overwrite:
                parts.remove()
                raise ConfigError(f"{output} is there already; name another file, or replace it with --overwrite")
            # Those of a directory that somebody has removed.
            _cancel(context, before)
            manifest = replace(manifest, queued=Queued(whole=whole, spans=_spans(manifest.shards, shards)))
            # Before the jobs: a worker that claims one finds it.
            parts.begin(manifest)
    return Submission(jobs=tuple(_queue(context, request, manifest, source, output, priority)), manifest=manifest)


def _cancel(context: Context, jobs: Sequence[Job]) -> None:
    context.queue.cancel([job.id for job in jobs if not job.ended])


def _name(context: Context, manifest: Manifest, source: Path, output: Path) -> tuple[str, list[Job]]:
    """A name that no prediction has yet, and the jobs of the last one that was the same."""
    same = {key: value for key, value in manifest.to_json().items() if key not in ("survey", "queued")}
    before: list[Job] = []
    for number in itertools.count():
        whole = digest({**same, "source": str(source), "output": str(output), "number": number})
        jobs = jobs_of_prediction(context.queue, output, whole)
        if not jobs:
            return whole, before
        before = jobs
    raise AssertionError("there is always another number")


def _is_there(context: Context, output: Path, last: Job) -> bool:
    """Whether the output is the file that a job has put together."""
    if last.state is not JobState.SUCCEEDED or not output.exists():
        return False
    return file_digest(output, context.settings) == (last.result or {}).get("sha256")


def _is_done(context: Context, queued: Queued) -> bool:
    """Whether the jobs have ended well, and only the directory was left behind."""
    last = digest({"whole": queued.whole, "span": None})
    found = context.queue.find(JobKind.PREDICT, [last]).get(last)
    return found is not None and found.state is JobState.SUCCEEDED


def _spans(shards: int, jobs: int) -> tuple[tuple[int, int], ...]:
    """Ranges of shards, as equal as they can be."""
    count = min(jobs, shards)
    edges = [shards * each // count for each in range(count + 1)] if count else []
    return tuple(itertools.pairwise(edges))


def _queue(
    context: Context, request: Request, manifest: Manifest, source: Path, output: Path, priority: int
) -> Sequence[Job]:
    assert manifest.queued is not None
    whole = Prediction(
        whole=manifest.queued.whole,
        span=None,
        source=source,
        output=output,
        request=request,
        manifest=manifest,
        host=socket.gethostname(),
    )
    parts = [replace(whole, span=span).job(priority=priority) for span in manifest.queued.spans]
    answering = context.queue.submit(parts, again=True)
    after = tuple(job.id for job in answering)
    return [*answering, *context.queue.submit([whole.job(priority=priority, after=after)], again=True)]
