"""The MLflow store that this process writes to: experiments, runs, the registry and pending outboxes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from rankwise.compat.mlflow import EXPERIMENT_KIND, TRAINING_KIND
from rankwise.exceptions import TrackingError
from rankwise.settings import Settings
from rankwise.tracking.connection import connect, is_final, tracking_errors, unreachable
from rankwise.tracking.notes import VIEW_TAG, table_view
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.outbox_recovery import ATTEMPT, Replay, SyncReport, adopt_orphans
from rankwise.tracking.query import RunRecord, search_runs
from rankwise.tracking.registry import JOB, Registry
from rankwise.tracking.run import KIND, NOTE, PARENT, SPEC_HASH, Run, Scalar, SystemMonitor, shorten
from rankwise.tracking.sender import Sender
from rankwise.tracking.values import storable

if TYPE_CHECKING:
    from rankwise.experiment.schema import ExperimentSpec

Kind = Literal["sweep", "train", "evaluate", "base", "predict", "promote"]
_FOREIGN = re.compile(r"[^\w.-]")


class Store:
    """A connection to MLflow. One per process; thread-safe; close it, or use it as a context manager.

    A server is first contacted when its answer is needed: `resume_run` and everything that a run writes work while it
    is unavailable. Other methods then raise `TrackingError`, and a later call tries again.
    """

    def __init__(self, settings: Settings, *, interval: float = 10.0) -> None:
        """Use `open`."""
        self.settings = settings
        self.registry = Registry(lambda: self.client)
        self._connected: MlflowClient | None = None
        self._connecting = threading.Lock()
        self._sender = Sender(
            lambda: self.client, interval=interval, unreachable=lambda: unreachable(settings.tracking_uri)
        )
        self._monitor = SystemMonitor()
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, settings: Settings, *, interval: float = 10.0) -> Store:
        """Open the store, and make it MLflow's current one (`mlflow.set_tracking_uri`) for the flavor API.

        A store in the home is created or upgraded, under a lock. A server is not contacted yet. Buffered points are
        delivered every `interval` seconds.

        Raises:
            TrackingError: The store in the home belongs to another MLflow release.
            StorageError: The home is not writable.
        """
        store = cls(settings, interval=interval)
        if settings.local_store:
            store._connected = connect(settings)
        mlflow.set_tracking_uri(settings.tracking_uri)
        return store

    @property
    def client(self) -> MlflowClient:
        """MLflow's client, for what has no method here."""
        with self._connecting:
            if self._connected is None:
                self._connected = connect(self.settings)
            return self._connected

    def experiment(self, name: str, spec: ExperimentSpec | None = None) -> str:
        """Return the id of an experiment, created if necessary; a deleted one is a `TrackingError`."""
        with tracking_errors(f"creating the experiment {name!r}"):
            existing = self.client.get_experiment_by_name(name)
            if existing is None:
                try:
                    return str(
                        self.client.create_experiment(name, self._artifact_location(name), tags=_experiment_tags(spec))
                    )
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    existing = self.client.get_experiment_by_name(name)
            assert existing is not None
            if existing.lifecycle_stage != "active":
                raise TrackingError(
                    f"the MLflow experiment {name!r} (id {existing.experiment_id}) is deleted: restore it with "
                    f"`mlflow experiments restore --experiment-id {existing.experiment_id}`, or give the definition "
                    "another name"
                )
            for key, value in _experiment_tags(spec).items():
                if existing.tags.get(key) != value:
                    self.client.set_experiment_tag(existing.experiment_id, key, value)
            return str(existing.experiment_id)

    def find_experiment(self, name: str) -> str | None:
        """Return the id of an active experiment, or None."""
        with tracking_errors(f"reading the experiment {name!r}"):
            existing = self.client.get_experiment_by_name(name)
        return str(existing.experiment_id) if existing is not None and existing.lifecycle_stage == "active" else None

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
        status: Literal["RUNNING", "SCHEDULED"] = "RUNNING",
        system_metrics: bool = True,
        attempt: int | None = None,
        fence: Callable[[], bool] | None = None,
    ) -> Run:
        """Create a run.

        Args:
            experiment_id: From `experiment`.
            name: As shown in the UI.
            parent: The run id of the parent.
            params: Written once; None is skipped.
            tags: Set at creation; None is skipped. `Provenance.tags` has MLflow's, `registry.JOB` names the job.
            description: Markdown.
            kind: The tag `rankwise.kind`.
            spec_hash: The tag `rankwise.spec_hash`.
            status: SCHEDULED if another process will resume the run; call `leave` then. It gets no system metrics.
            system_metrics: Whether the process's monitor writes its samples to this run.
            attempt: See `resume_run`.
            fence: See `resume_run`.
        """
        special = {
            PARENT: parent,
            KIND: kind,
            SPEC_HASH: spec_hash,
            NOTE: None if description is None else shorten(description),
        }
        special |= {} if attempt is None else {ATTEMPT: str(attempt)}
        merged = {**(tags or {}), **{key: value for key, value in special.items() if value is not None}}
        started = time.time_ns() // 1_000_000
        with tracking_errors(f"creating the run {name!r}"):
            created = self.client.create_run(
                experiment_id,
                start_time=started,
                tags={key: storable(str(value)) for key, value in merged.items() if value is not None},
                run_name=name,
            )
            run_id = str(created.info.run_id)
            if status != "RUNNING":  # MLflow creates every run as RUNNING.
                self.client.update_run(run_id, status=status)
        outbox = Outbox.create(self.settings.outbox, run_id, self.settings.tracking_uri, attempt=attempt, once=True)
        # A new run has no points to compare with.
        self._sender.add(outbox, fence=fence)
        run = self._open_run(outbox, started, system_metrics and status == "RUNNING")
        run.params(params or {})
        return run

    def resume_run(
        self,
        run_id: str,
        *,
        system_metrics: bool = True,
        repeats: bool = True,
        restart: bool = True,
        attempt: int | None = None,
        fence: Callable[[], bool] | None = None,
    ) -> Run:
        """Resume a run that was scheduled or interrupted. The store may be unavailable.

        Outboxes of earlier processes on this machine are delivered first. If the run does not exist, that is refused.

        Args:
            run_id: The run.
            system_metrics: See `start_run`.
            repeats: Whether steps may be repeated, whose points are then skipped. False writes every point: of two at
                one step, the later one counts.
            restart: Whether to set the status to RUNNING. With False, call `leave` at the end.
            attempt: The number of this attempt at the run's job: the tag `rankwise.attempt`. Records of an earlier
                attempt that are delivered later then change neither the status nor the tags.
            fence: May this process still write to the run? Called before every request, in another thread; an error
                means unknown. Once it returns False, nothing more is delivered.

        Raises:
            TrackingError: The run is already open in this process.
            StorageError: The disk is full, or the home is not writable.
        """
        with self._lock:
            if run_id in self._runs:
                raise TrackingError(f"run {run_id} is already open in this process")
        for orphan in adopt_orphans(self.settings, run_id).outboxes:
            if orphan.pending:
                self._sender.add(orphan, missing=Replay(orphan).missing, fence=fence, orphaned=True)
            else:
                orphan.close()
        outbox = Outbox.create(self.settings.outbox, run_id, self.settings.tracking_uri, attempt=attempt, once=repeats)
        self._sender.add(outbox, missing=Replay(outbox).missing, fence=fence)
        run = self._open_run(outbox, time.time_ns() // 1_000_000, system_metrics)
        if restart:
            run.restart()
        if attempt is not None:
            run.tags({ATTEMPT: attempt})
        return run

    def find_scheduled(self, experiment_id: str) -> dict[int, str]:
        """Return the SCHEDULED runs by job number (the tag `rankwise.job`); the first run of a job counts."""
        scheduled: dict[int, str] = {}
        for run in search_runs(self.client, experiment_id, status="SCHEDULED"):
            if (job := run.tags.get(JOB, "")).isdecimal():
                scheduled.setdefault(int(job), run.run_id)
        return scheduled

    def is_open(self, run_id: str) -> bool:
        """Return whether this process writes to the run."""
        with self._lock:
            return run_id in self._runs

    def runs(self, experiment_id: str, *, kind: Kind | None = None) -> list[RunRecord]:
        """Return all runs of an experiment, optionally of one kind, oldest first (see `query.search_runs`)."""
        return search_runs(self.client, experiment_id, kind=kind)

    def find_running(self, experiment_id: str, job: int, kind: Kind) -> str | None:
        """Return the first RUNNING run of a job (the tag `rankwise.job`), or None."""
        running = search_runs(self.client, experiment_id, kind=kind, tags={JOB: str(job)}, status="RUNNING")
        return running[0].run_id if running else None

    def sync(self, timeout: float = 60.0) -> SyncReport:
        """Deliver the outboxes of ended processes, for at most `timeout` seconds."""
        deadline = time.monotonic() + timeout
        orphans = adopt_orphans(self.settings)
        problems = list(orphans.problems)
        delivered: list[str] = []
        waiting: dict[str, str] = {}
        # Includes outboxes of this process whose runs have ended.
        adopted = self._sender.orphans
        outage = unreachable(self.settings.tracking_uri) if orphans.outboxes or adopted else None
        for outbox in orphans.outboxes:
            replay = Replay(outbox)
            if reason := outage or self._reason_to_wait(replay):
                waiting[outbox.run_id] = reason
                outbox.close()
            else:
                self._sender.add(outbox, missing=replay.missing)
                adopted.append(outbox)
        for outbox in adopted:
            done = self._sender.drain(outbox, 0.0 if outage else max(0.0, deadline - time.monotonic()))
            problems += [f"run {outbox.run_id}: {refusal}" for refusal in self._sender.detach(outbox)]
            if done:
                delivered.append(outbox.run_id)
            else:
                waiting[outbox.run_id] = outage or self._sender.outage or "the store is slow"
        return SyncReport(delivered=tuple(delivered), waiting=waiting, problems=tuple(problems))

    def _reason_to_wait(self, replay: Replay) -> str | None:
        """Return why an outbox cannot be delivered yet, or None."""
        try:
            return "a later attempt is writing to this run" if replay.newer_attempt_running(self.client) else None
        except TrackingError as error:
            # If the run does not exist, the sender moves its records aside.
            return None if is_final(error.__cause__ or error) else str(error)

    def close(self, timeout: float = 30.0) -> bool:
        """Deliver buffered records and stop the threads; return whether everything is delivered.

        Runs that were not ended stay RUNNING; undelivered records stay in the outbox for `sync`.
        """
        self._monitor.close()
        return self._sender.close(timeout)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(timeout=30.0 if error is None else 5.0)

    def _open_run(self, outbox: Outbox, started_ms: int, system_metrics: bool) -> Run:
        run = Run(run_id=outbox.run_id, started_ms=started_ms, outbox=outbox, sender=self._sender, on_end=self._forget)
        with self._lock:
            self._runs[run.run_id] = run
        if system_metrics:
            self._monitor.attach(run)
        return run

    def _forget(self, run: Run) -> None:
        self._monitor.detach(run)
        with self._lock:
            self._runs.pop(run.run_id, None)

    def _artifact_location(self, name: str) -> str | None:
        """Artifacts of a local store are in the home; a server chooses its own location."""
        if not self.settings.local_store:
            return None
        folder = _FOREIGN.sub("_", name)
        if folder != name or folder.startswith("."):
            folder = f"{folder.lstrip('.')}-{sha256(name.encode()).hexdigest()[:8]}"
        return (self.settings.artifacts / folder).as_uri()


def _experiment_tags(spec: ExperimentSpec | None) -> dict[str, str]:
    # Without this tag, the UI asks whether the experiment is about training or language model applications.
    tags = {EXPERIMENT_KIND: TRAINING_KIND}
    if spec is not None:
        tags[VIEW_TAG] = table_view(spec)
    if spec is not None and spec.description:
        tags[NOTE] = shorten(storable(spec.description))
    return tags
