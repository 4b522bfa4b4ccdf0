"""From `rankwise predict --submit` to jobs: one for each range of shards, and one that puts the output together.

The directory `OUTPUT.parts` belongs to the jobs from then on. The same command again finds the same jobs; those that
had failed or were cancelled are tried again.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rankwise.assets.digest import file_digest
from rankwise.exceptions import ConfigError
from rankwise.experiment.hashing import digest
from rankwise.inference.begin import check_paths, check_unchanged, new_manifest
from rankwise.inference.request import Request
from rankwise.inference.shards import Manifest, Parts, Queued
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.tasks.context import Context
from rankwise.tasks.prediction import Prediction, confine_files, jobs_of_prediction


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
