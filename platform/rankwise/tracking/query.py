"""Reading many runs at once: one request per thousand runs, never one per run.

An arm's own run names the sweep that trained it as its parent. A definition that was extended has arms of earlier
sweeps too, so its run lists all of them.

- Which arms belong to a sweep, and which sweep of an experiment is the current one, as tags of the sweep's run.
- Small JSON artifacts of many runs, several requests at a time.
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
from rankwise.tracking.errors import describe, paged, tracking_errors
from rankwise.tracking.run import KIND, PARENT, REASON, SPEC_HASH

_PAGE = 1000
_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of a curve; `timestamp_ms` is milliseconds since 1970."""

    step: int
    value: float
    timestamp_ms: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as the store has it. `params` are texts, as MLflow keeps them; `metrics` are the latest values.

    `status` is MLflow's: FINISHED, FAILED, KILLED, RUNNING or SCHEDULED; times are milliseconds since 1970.
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
        """The arm."""
        return self.tags.get(SPEC_HASH)

    @property
    def reason(self) -> str | None:
        """Why the run failed or was killed."""
        return self.tags.get(REASON)

    @property
    def seconds(self) -> float | None:
        """From start to end; None while it runs."""
        return None if self.ended_ms is None else (self.ended_ms - self.started_ms) / 1000

    @classmethod
    def of(cls, run: MlflowRun) -> RunRecord:
        """Out of MLflow's entity."""
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
    """All runs of experiments that fit, oldest first.

    Args:
        client: The client of the store.
        experiment_ids: The experiments; none, no runs.
        kind: Only runs of this kind.
        tags: Only runs with these tags.
        status: Only runs of this status.

    Raises:
        TrackingError: The store cannot be reached.
    """
    wanted = dict(tags or {})
    if kind is not None:
        wanted[KIND] = kind
    conditions = [f"tags.`{key}` = '{_quoted(value)}'" for key, value in wanted.items()]
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
    """Pause the cyclic garbage collector: it takes half of the time where a thousand runs make 60,000 objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def get_run(client: MlflowClient, run_id: str) -> RunRecord:
    """One run.

    Raises:
        TrackingError: There is none, or the store cannot be reached.
    """
    with tracking_errors(f"reading run {run_id}"):
        return RunRecord.of(client.get_run(run_id))


def by_spec_hash(runs: Iterable[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of each arm, in the given order; runs without a spec hash are left out."""
    grouped: dict[str, list[RunRecord]] = {}
    for run in runs:
        if run.spec_hash is not None:
            grouped.setdefault(run.spec_hash, []).append(run)
    return grouped


def metric_histories(
    client: MlflowClient, run_ids: Sequence[str], keys: Sequence[str]
) -> dict[str, dict[str, list[Point]]]:
    """Whole curves, several requests at a time.

    Returns:
        Run id to key to points by step; a curve that does not exist is an empty list.

    Raises:
        TrackingError: The store cannot be reached, or a run does not exist.
    """
    pairs = [(run_id, key) for run_id in run_ids for key in keys]

    def read(pair: tuple[str, str]) -> list[Point]:
        with tracking_errors(f"reading {pair[1]} of run {pair[0]}"):
            history = client.get_metric_history(*pair)
        points = [Point(step=metric.step, value=metric.value, timestamp_ms=metric.timestamp) for metric in history]
        return sorted(points, key=lambda point: (point.step, point.timestamp_ms))

    curves: dict[str, dict[str, list[Point]]] = {run_id: {} for run_id in run_ids}
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        for (run_id, key), points in zip(pairs, pool.map(read, pairs), strict=True):
            curves[run_id][key] = points
    return curves


def _quoted(value: str) -> str:
    # MLflow's filter language has no escape for a quote; hashes, ids and kinds have none.
    if "'" in value:
        raise ValueError(f"a tag to search for must not contain a quote, got {value!r}")
    return value


ARMS = "rankwise.arms"
SUBMITTED = "rankwise.submitted"
_SHORT = 12
# A tag holds 8,000 characters: 600 hashes of 12 digits and a comma each.
_PER_TAG = 600


def sweep_tags(spec_hashes: Collection[str]) -> dict[str, str]:
    """Tags for the run of a sweep, set whenever it is submitted (or has grown by a round of a search).

    Args:
        spec_hashes: Of all of its arms, also those that were trained before.
    """
    shorts = sorted({spec_hash[:_SHORT] for spec_hash in spec_hashes})
    parts = [shorts[start : start + _PER_TAG] for start in range(0, len(shorts), _PER_TAG)]
    tags = {ARMS if number == 0 else f"{ARMS}.{number}": ",".join(part) for number, part in enumerate(parts)}
    return {**tags, SUBMITTED: str(time.time_ns() // 1_000_000)}


def current_sweep(sweeps: Sequence[RunRecord]) -> RunRecord | None:
    """The sweep that was submitted last, of the runs of kind `sweep`."""
    return max(sweeps, key=_submitted, default=None)


def of_sweep(sweep: RunRecord, arms: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs of arms that belong to a sweep: those it lists, and those it is the parent of."""
    belongs = membership(sweep)
    return [run for run in arms if belongs(run.parent, run.spec_hash or "")]


def membership(sweep: RunRecord) -> Callable[[str | None, str], bool]:
    """Tells of an arm, by the run id of its parent and its spec hash, whether it belongs to a sweep."""
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
    """The JSON artifact `path` of each run; runs without such an artifact are left out.

    Args:
        client: The client of the store.
        runs: Run id to the URI of its artifacts; where that is empty, it is asked for.
        path: As it was logged.

    Raises:
        TrackingError: The store cannot be reached, or what is stored is no JSON.
    """
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        texts = pool.map(lambda run: _text(client, run[0], run[1], path), runs.items())
        with without_collector():
            return {run_id: _parsed(text, run_id, path) for run_id, text in zip(runs, texts, strict=True) if text}


def _text(client: MlflowClient, run_id: str, artifacts: str, path: str) -> str | None:
    if not artifacts:
        artifacts = get_run(client, run_id).artifact_uri
    where = urlparse(artifacts)
    if where.scheme in {"", "file"}:  # On this machine: no request, and thousands are read in a second.
        file = Path(unquote(where.path)) / path
        return file.read_text() if file.is_file() else None
    parent = path.rpartition("/")[0] or None
    with tracking_errors(f"reading {path} of run {run_id}"):
        try:
            with TemporaryDirectory() as directory:
                return Path(download_artifacts(artifact_uri=f"{artifacts}/{path}", dst_path=directory)).read_text()
        except Exception as error:  # Each kind of store has its own error for a file that is not there: ask.
            if any(found.path == path for found in client.list_artifacts(run_id, parent)):
                raise TrackingError(f"{path} of run {run_id} cannot be read: {describe(error)}") from error
            return None


def _parsed(text: str, run_id: str, path: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TrackingError(f"the artifact {path} of run {run_id} is no JSON: {error}") from error
