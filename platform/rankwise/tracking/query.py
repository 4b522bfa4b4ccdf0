"""Search and read runs, their curves and JSON artifacts, with few requests; find the arms of a sweep.

The run of an arm names the sweep that trained it as its parent. After an extension, a sweep also has arms of earlier
sweeps, so the tags of its run list all of its arms. Functions raise `TrackingError` if the store is unreachable or has
no such run.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlparse

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run as MlflowRun

from rankwise.exceptions import TrackingError
from rankwise.tracking.connection import describe, paged, tracking_errors
from rankwise.tracking.run import KIND, PARENT, REASON, SPEC_HASH

_PAGE = 1000
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class MetricPoint:
    """One value of a curve; `timestamp_ms` is milliseconds since 1970."""

    step: int
    value: float
    timestamp_ms: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as stored: `params` as MLflow's texts, the latest `metrics`, times in milliseconds since 1970.

    `status` is FINISHED, FAILED, KILLED, RUNNING or SCHEDULED.
    """

    run_id: str
    experiment_id: str
    name: str
    status: str
    started_ms: int
    ended_ms: int | None
    artifact_uri: str
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    tags: Mapping[str, str]

    @property
    def parent(self) -> str | None:
        """The id of the parent run."""
        return self.tags.get(PARENT)

    @property
    def kind(self) -> str | None:
        """`sweep`, `train`, `evaluate` or `base`."""
        return self.tags.get(KIND)

    @property
    def spec_hash(self) -> str | None:
        """The spec hash of the arm."""
        return self.tags.get(SPEC_HASH)

    @property
    def reason(self) -> str | None:
        """Why the run failed or was killed."""
        return self.tags.get(REASON)

    @property
    def seconds(self) -> float | None:
        """Duration; None while the run has not ended."""
        return None if self.ended_ms is None else (self.ended_ms - self.started_ms) / 1000

    @classmethod
    def of(cls, run: MlflowRun) -> RunRecord:
        """Convert MLflow's entity."""
        return cls(
            run_id=run.info.run_id,
            experiment_id=run.info.experiment_id,
            name=run.info.run_name or run.info.run_id,
            status=run.info.status,
            started_ms=run.info.start_time,
            ended_ms=run.info.end_time,
            artifact_uri=run.info.artifact_uri,
            params=dict(run.data.params),
            metrics=dict(run.data.metrics),
            tags=dict(run.data.tags),
        )


def search_runs(
    client: MlflowClient,
    *experiment_ids: str,
    kind: str | None = None,
    tags: Mapping[str, str] | None = None,
    status: str | None = None,
) -> list[RunRecord]:
    """Return all runs of the experiments with this kind, these tags and this status, oldest first."""
    required_tags = dict(tags or {})
    if kind is not None:
        required_tags[KIND] = kind
    conditions = [f"tags.`{key}` = '{_quoted(value)}'" for key, value in required_tags.items()]
    if status is not None:
        conditions.append(f"attributes.status = '{_quoted(status)}'")
    filters = " AND ".join(conditions)
    if not experiment_ids:
        return []

    def fetch(token: str | None) -> Any:
        with without_collector():
            return client.search_runs(
                list(experiment_ids),
                filter_string=filters,
                max_results=_PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )

    doing = f"reading the runs of experiment {', '.join(experiment_ids[:3])}"
    return [RunRecord.of(run) for run in paged(doing, fetch)]


@contextmanager
def without_collector() -> Iterator[None]:
    """Pause the cyclic garbage collector, which takes half the time of reading a thousand runs (60,000 objects)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def get_run(client: MlflowClient, run_id: str) -> RunRecord:
    """Return one run."""
    with tracking_errors(f"reading run {run_id}"):
        return RunRecord.of(client.get_run(run_id))


def by_spec_hash(runs: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """Group runs by arm, in the given order; runs without a spec hash are left out."""
    grouped: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.spec_hash is not None:
            grouped.setdefault(run.spec_hash, []).append(run)
    return grouped


def metric_histories(
    client: MlflowClient, run_ids: Sequence[str], keys: Sequence[str]
) -> dict[str, dict[str, list[MetricPoint]]]:
    """Read whole curves, in parallel: run id to key to points by step, empty for a curve that does not exist."""
    pairs = [(run_id, key) for run_id in run_ids for key in keys]

    def read(pair: tuple[str, str]) -> list[MetricPoint]:
        with tracking_errors(f"reading {pair[1]} of run {pair[0]}"):
            history = client.get_metric_history(*pair)
        points = [
            MetricPoint(step=metric.step, value=metric.value, timestamp_ms=metric.timestamp) for metric in history
        ]
        return sorted(points, key=lambda point: (point.step, point.timestamp_ms))

    curves: dict[str, dict[str, list[MetricPoint]]] = {run_id: {} for run_id in run_ids}
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for (run_id, key), points in zip(pairs, pool.map(read, pairs), strict=True):
            curves[run_id][key] = points
    return curves


def _quoted(value: str) -> str:
    # MLflow's filter language cannot escape a quote. Hashes, ids and kinds have none.
    if "'" in value:
        raise ValueError(f"a tag to search for must not contain a quote, got {value!r}")
    return value


ARMS = "rankwise.arms"
SUBMITTED = "rankwise.submitted"
_SHORT = 12
# A tag holds 8,000 characters; each hash takes 12 digits and a comma.
_PER_TAG = 600


def sweep_tags(spec_hashes: Collection[str]) -> dict[str, str]:
    """Return the tags of a sweep's run for all of its arms, to be set on every submission."""
    return {**member_tags(spec_hashes), SUBMITTED: str(time.time_ns() // 1_000_000)}


def member_tags(spec_hashes: Collection[str]) -> dict[str, str]:
    """Return those of `sweep_tags` that list the arms, to be set when a round or a stage adds some."""
    shorts = sorted({spec_hash[:_SHORT] for spec_hash in spec_hashes})
    parts = [shorts[start : start + _PER_TAG] for start in range(0, len(shorts), _PER_TAG)]
    return {ARMS if number == 0 else f"{ARMS}.{number}": ",".join(part) for number, part in enumerate(parts)}


def current_sweep(sweeps: Sequence[RunRecord]) -> RunRecord | None:
    """Return the sweep that was submitted last, of runs of kind `sweep`."""
    return max(sweeps, key=_submitted, default=None)


def of_sweep(sweep: RunRecord, arms: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs of arms that belong to a sweep: it lists them or is their parent."""
    belongs = membership(sweep)
    return [run for run in arms if belongs(run.parent, run.spec_hash or "")]


def membership(sweep: RunRecord) -> Callable[[str | None, str], bool]:
    """Return a function that says whether an arm, given its parent's run id and its spec hash, belongs to the sweep."""
    listed = {
        short
        for key, value in sweep.tags.items()
        if key == ARMS or key.startswith(f"{ARMS}.")
        for short in value.split(",")
    }
    return lambda parent, spec_hash: parent == sweep.run_id or spec_hash[:_SHORT] in listed


def _submitted(run: RunRecord) -> int:
    text = run.tags.get(SUBMITTED, "")
    return int(text) if text.isdecimal() else run.started_ms


def read_json(client: MlflowClient, runs: Mapping[str, str], path: str) -> dict[str, Any]:
    """Return the JSON artifact `path` of each run that has it. An empty artifact URI in `runs` is looked up.

    Raises:
        TrackingError: The store is unreachable, or the artifact is not JSON.
    """
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        texts = pool.map(lambda run: _text(client, run[0], run[1], path), runs.items())
        with without_collector():
            return {run_id: _parsed(text, run_id, path) for run_id, text in zip(runs, texts, strict=True) if text}


def _text(client: MlflowClient, run_id: str, artifacts: str, path: str) -> str | None:
    if not artifacts:
        artifacts = get_run(client, run_id).artifact_uri
    location = urlparse(artifacts)
    if location.scheme in {"", "file"}:  # Reading local files without MLflow takes a second for thousands of runs.
        file = Path(unquote(location.path)) / path
        return file.read_text() if file.is_file() else None
    parent = path.rpartition("/")[0] or None
    with tracking_errors(f"reading {path} of run {run_id}"):
        try:
            with TemporaryDirectory() as directory:
                return Path(download_artifacts(artifact_uri=f"{artifacts}/{path}", dst_path=directory)).read_text()
        except Exception as error:  # Each kind of store has its own error for a missing file, so list the files.
            if any(info.path == path for info in client.list_artifacts(run_id, parent)):
                raise TrackingError(f"{path} of run {run_id} cannot be read: {describe(error)}") from error
            return None


def _parsed(text: str, run_id: str, path: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TrackingError(f"the artifact {path} of run {run_id} is not JSON: {error}") from error
