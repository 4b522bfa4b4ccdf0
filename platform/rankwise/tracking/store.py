"""The MLflow store that this process writes to: experiments, runs, the registry."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rankwise.exceptions import TrackingError
from rankwise.settings import Settings
from rankwise.tracking.connect import connect, unreachable
from rankwise.tracking.errors import tracking_errors
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.query import RunRecord, get_run, metric_histories, search_runs
from rankwise.tracking.redact import redact
from rankwise.tracking.registry import Registry
from rankwise.tracking.runs import KIND, NOTE, PARENT, SPEC_HASH, Run, Scalar, shorten
from rankwise.tracking.sender import Sender
from rankwise.tracking.system_metrics import PREFIX, SystemMonitor

if TYPE_CHECKING:
    from rankwise.experiment.schema import ExperimentSpec

Kind = Literal["sweep", "train", "evaluate", "base", "predict"]
_FOREIGN = re.compile(r"[^\w.-]")


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What `Store.sync` did with outboxes that earlier processes left.

    Attributes:
        delivered: Run ids of which all was delivered.
        waiting: Run ids of which something still waits.
        problems: Refused records and files that are not for this store, one line each.
    """

    delivered: tuple[str, ...]
    waiting: tuple[str, ...]
    problems: tuple[str, ...]


class Store:
    """A connection to MLflow. One per process; thread-safe; close it, or use it as a context manager.

    Attributes:
        settings: As given.
        client: MLflow's client, for what has no method here (flavor).
        registry: The model registry.
    """

    def __init__(self, settings: Settings, client: MlflowClient, *, interval: float = 3.0) -> None:
        """Use `open`."""
        self.settings = settings
        self.client = client
        self.registry = Registry(client)
        self._sender = Sender(client, interval=interval, unreachable=lambda: unreachable(settings.tracking_uri))
        self._monitor = SystemMonitor()
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, settings: Settings, *, interval: float = 3.0) -> Store:
        """Connect; a store in the home is created or brought up to date first, under a lock.

        MLflow's own current store (`mlflow.set_tracking_uri`) is set to it, since the flavor API of MLflow uses that.

        Args:
            settings: Where the store is.
            interval: Seconds between two deliveries of buffered points.

        Raises:
            TrackingError: The server cannot be reached, or the store belongs to another MLflow release.
            StorageError: The home cannot be written.
        """
        client = connect(settings)
        mlflow.set_tracking_uri(settings.tracking_uri)
        return cls(settings, client, interval=interval)

    def experiment(self, name: str, spec: ExperimentSpec | None = None) -> str:
        """The id of the experiment of that name, created if need be.

        Raises:
            TrackingError: It was deleted, or the store refuses.
        """
        with tracking_errors(f"creating the experiment {name!r}"):
            found = self.client.get_experiment_by_name(name)
            if found is None:
                try:
                    return str(
                        self.client.create_experiment(name, self._artifact_location(name), tags=_experiment_tags(spec))
                    )
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self.client.get_experiment_by_name(name)
            assert found is not None
            if found.lifecycle_stage != "active":
                raise TrackingError(
                    f"the MLflow experiment {name!r} (id {found.experiment_id}) is deleted: restore it with "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`, or give the definition "
                    "another name"
                )
            for key, value in _experiment_tags(spec).items():
                if found.tags.get(key) != value:
                    self.client.set_experiment_tag(found.experiment_id, key, value)
            return str(found.experiment_id)

    def find_experiment(self, name: str) -> str | None:
        """The id of an active experiment; None when there is none of that name."""
        with tracking_errors(f"reading the experiment {name!r}"):
            found = self.client.get_experiment_by_name(name)
        return str(found.experiment_id) if found is not None and found.lifecycle_stage == "active" else None

    def start_run(
        self,
        experiment_id: str,
        name: str,
        *,
        parent: str | None = None,
        params: Mapping[str, Scalar] | None = None,
        tags: Mapping[str, Scalar] | None = None,
        description: str | None = None,
        kind: Kind | None = None,
        spec_hash: str | None = None,
        system_metrics: bool = True,
    ) -> Run:
        """Create a run.

        Args:
            experiment_id: From `experiment`.
            name: As shown in the UI.
            parent: The run id of the parent.
            params: Written once; None is left out.
            tags: None is left out. `mlflow.user` and `mlflow.source.*` come from `Provenance.tags`.
            description: Markdown.
            kind: What the run does: the tag `rankwise.kind`.
            spec_hash: The arm: the tag `rankwise.spec_hash`.
            system_metrics: Whether the monitor of the process writes its samples to this run.

        Raises:
            TrackingError: The server cannot be reached or refuses.
        """
        special = {
            PARENT: parent,
            KIND: kind,
            SPEC_HASH: spec_hash,
            NOTE: None if description is None else shorten(description),
        }
        merged = {**(tags or {}), **{key: value for key, value in special.items() if value is not None}}
        started = time.time_ns() // 1_000_000
        with tracking_errors(f"creating the run {name!r}"):
            created = self.client.create_run(
                experiment_id,
                start_time=started,
                tags={key: str(value) for key, value in merged.items() if value is not None},
                run_name=name,
            )
        run = self._open_run(created.info.run_id, experiment_id, name, started, system_metrics)
        run.params(params or {})
        return run

    def resume_run(
        self, run_id: str, *, system_metrics: bool = True, repeats: bool = True, timeout: float = 60.0
    ) -> Run:
        """Go on with a run that was interrupted: it is RUNNING again.

        What an earlier process left in its outbox is delivered first, and points that are there already are not
        written again by steps that are redone.

        Args:
            run_id: The run.
            system_metrics: As in `start_run`.
            repeats: Whether steps may be done again, whose points are then dropped. False writes every point: of two
                at one step the later one counts.
            timeout: Seconds for the delivery of what was left.

        Raises:
            TrackingError: There is no such run, the store cannot be reached, or this process has the run open.
        """
        with self._lock:
            if run_id in self._runs:
                raise TrackingError(f"run {run_id} is open in this process already")
        report = self.sync(timeout, run_id=run_id)
        if report.waiting:
            raise TrackingError(f"resuming run {run_id}: {self._sender.outage or 'the store is slow'}")
        record = get_run(self.client, run_id)
        keys = [key for key in record.metrics if not key.startswith(PREFIX)] if repeats else []
        curves = metric_histories(self.client, [run_id], keys)[run_id]
        known = frozenset((key, point.step) for key, points in curves.items() for point in points)
        run = self._open_run(
            run_id, record.experiment_id, record.name, record.started_ms, system_metrics, known, record.params
        )
        run.restart()
        return run

    def runs(self, experiment_id: str, *, kind: Kind | None = None, parent: str | None = None) -> list[RunRecord]:
        """All runs of an experiment that fit, oldest first (see `query.search_runs`)."""
        return search_runs(self.client, experiment_id, kind=kind, parent=parent)

    def sync(self, timeout: float = 60.0, *, run_id: str | None = None) -> SyncReport:
        """Deliver what earlier processes left in the outbox; files of living processes are not touched.

        Args:
            timeout: Seconds in all.
            run_id: Only what belongs to this run.
        """
        deadline = time.monotonic() + timeout
        adopted, problems = self._adopt(run_id)
        for outbox in adopted:
            self._sender.add(outbox)
        delivered: list[str] = []
        waiting: list[str] = []
        for outbox in adopted:
            done = self._sender.drain(outbox, max(0.0, deadline - time.monotonic()))
            problems += [f"run {outbox.run_id}: {refusal}" for refusal in self._sender.remove(outbox)]
            (delivered if done else waiting).append(outbox.run_id)
        return SyncReport(delivered=tuple(delivered), waiting=tuple(waiting), problems=tuple(problems))

    def close(self, timeout: float = 30.0) -> bool:
        """Deliver what is buffered and stop the threads; runs that were not ended stay RUNNING.

        Returns:
            Whether all was delivered; if not, it waits in the outbox for `sync`.
        """
        self._monitor.close()
        return self._sender.close(timeout)

    def __enter__(self) -> Store:
        """The store itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it, quickly when an error or Ctrl-C is under way."""
        self.close(timeout=30.0 if error is None else 5.0)

    def _open_run(
        self,
        run_id: str,
        experiment_id: str,
        name: str,
        started_ms: int,
        system_metrics: bool,
        known: frozenset[tuple[str, int]] = frozenset(),
        params: Mapping[str, str] | None = None,
    ) -> Run:
        outbox = Outbox.create(self.settings.outbox, run_id, self.settings.tracking_uri)
        self._sender.add(outbox)
        run = Run(
            run_id=run_id,
            experiment_id=experiment_id,
            name=name,
            started_ms=started_ms,
            outbox=outbox,
            sender=self._sender,
            params=params,
            known=known,
            on_end=self._forget,
        )
        with self._lock:
            self._runs[run_id] = run
        if system_metrics:
            self._monitor.attach(run)
        return run

    def _forget(self, run: Run) -> None:
        self._monitor.detach(run)
        with self._lock:
            self._runs.pop(run.run_id, None)

    def _adopt(self, run_id: str | None) -> tuple[list[Outbox], list[str]]:
        """Outboxes without a living writer, oldest first, and why others were passed over."""
        adopted: list[Outbox] = []
        problems: list[str] = []
        found = self.settings.outbox.glob(f"{run_id or '*'}.*.jsonl")
        for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name)):
            try:
                outbox = Outbox.adopt(path)
            except TrackingError as error:
                problems.append(str(error))
                continue
            if outbox is None:
                continue
            if outbox.tracking_uri != redact(self.settings.tracking_uri):
                problems.append(f"{path} is for the store {outbox.tracking_uri}: set MLFLOW_TRACKING_URI to it")
                outbox.close()
                continue
            adopted.append(outbox)
        return adopted, problems

    def _artifact_location(self, name: str) -> str | None:
        """A local store keeps artifacts in the home; a server decides for itself."""
        if not self.settings.local_store:
            return None
        folder = _FOREIGN.sub("_", name)
        if folder != name or folder.startswith("."):
            folder = f"{folder.lstrip('.')}-{sha256(name.encode()).hexdigest()[:8]}"
        return (self.settings.artifacts / folder).as_uri()


def _experiment_tags(spec: ExperimentSpec | None) -> dict[str, str]:
    # The kind keeps the UI from asking whether this is about training or about language model applications.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    if spec is not None and spec.description:
        tags[NOTE] = shorten(spec.description)
    return tags
