"""The MLflow store that this process writes to: experiments, runs, the registry."""

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
from rankwise.tracking.errors import connect, is_final, tracking_errors, unreachable
from rankwise.tracking.notes import VIEW_TAG, table_view
from rankwise.tracking.outbox import Outbox
from rankwise.tracking.query import RunRecord, search_runs
from rankwise.tracking.recovery import ATTEMPT, Replay, SyncReport, find_left
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

    A server is contacted when something is asked of it for the first time: `resume_run` and everything that a run
    takes work while it is away.

    Attributes:
        settings: As given.
        registry: The model registry.
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
        """Open the store.

        One in the home is created or brought up to date, under a lock; a server is not contacted yet.

        MLflow's own current store (`mlflow.set_tracking_uri`) is set to it, since the flavor API of MLflow uses that.

        Args:
            settings: Where the store is.
            interval: Seconds between two deliveries of buffered points.

        Raises:
            TrackingError: The store in the home belongs to another MLflow release.
            StorageError: The home cannot be written.
        """
        store = cls(settings, interval=interval)
        if settings.local_store:
            store._connected = connect(settings)
        mlflow.set_tracking_uri(settings.tracking_uri)
        return store

    @property
    def client(self) -> MlflowClient:
        """MLflow's client, for what has no method here (flavor).

        Raises:
            TrackingError: The server does not answer; asking again later tries again.
        """
        with self._connecting:
            if self._connected is None:
                self._connected = connect(self.settings)
            return self._connected

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
            params: Written once; None is left out.
            tags: Set in the moment of creation. None is left out. `mlflow.user` and `mlflow.source.*` come from
                `Provenance.tags`, `rankwise.job` (`registry.JOB`) names the job.
            description: Markdown.
            kind: What the run does: the tag `rankwise.kind`.
            spec_hash: The arm: the tag `rankwise.spec_hash`.
            status: SCHEDULED for what somebody else will do (`resume_run`): `leave` it. No system metrics then.
            system_metrics: Whether the monitor of the process writes its samples to this run.
            attempt: As in `resume_run`.
            fence: Likewise.

        Raises:
            TrackingError: The server cannot be reached or refuses.
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
        # The process that makes a run knows that it has nothing yet.
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
        """Go on with a run that was scheduled or interrupted. The store need not answer now.

        What an earlier process on this machine left in its outbox is delivered first, and points that are there by
        then are not written again by steps that are redone.

        Args:
            run_id: The run. One that does not exist is found out by the first delivery, which is refused.
            system_metrics: As in `start_run`.
            repeats: Whether steps may be done again, whose points are then dropped. False writes every point: of two
                at one step the later one counts.
            restart: Whether the run is RUNNING from now on. False leaves its state alone: `leave` it then.
            attempt: The number of this attempt at the run's job: the tag `rankwise.attempt`. What an earlier attempt
                left and somebody delivers later then changes neither the state nor the tags of the later one.
            fence: Whether this process may still speak for the run: asked before every request, in another thread. An
                error means that nobody knows now. After a no nothing more is delivered.

        Raises:
            TrackingError: This process has the run open.
            StorageError: The disk is full, or the home is not writable.
        """
        with self._lock:
            if run_id in self._runs:
                raise TrackingError(f"run {run_id} is open in this process already")
        for left in find_left(self.settings, run_id).outboxes:
            if left.pending:
                self._sender.add(left, missing=Replay(left).missing, fence=fence, left=True)
            else:
                left.close()
        outbox = Outbox.create(self.settings.outbox, run_id, self.settings.tracking_uri, attempt=attempt, once=repeats)
        self._sender.add(outbox, missing=Replay(outbox).missing, fence=fence)
        run = self._open_run(outbox, time.time_ns() // 1_000_000, system_metrics)
        if restart:
            run.restart()
        if attempt is not None:
            run.tags({ATTEMPT: attempt})
        return run

    def find_scheduled(self, experiment_id: str) -> dict[int, str]:
        """Runs that nobody has begun, by the number of their job (the tag `rankwise.job`).

        Of two runs of one job the first counts.

        Raises:
            TrackingError: The server cannot be reached.
        """
        found: dict[int, str] = {}
        for run in search_runs(self.client, experiment_id, status="SCHEDULED"):
            if (job := run.tags.get(JOB, "")).isdecimal():
                found.setdefault(int(job), run.run_id)
        return found

    def is_open(self, run_id: str) -> bool:
        """Whether this process writes to the run."""
        with self._lock:
            return run_id in self._runs

    def runs(self, experiment_id: str, *, kind: Kind | None = None) -> list[RunRecord]:
        """All runs of an experiment that fit, oldest first (see `query.search_runs`)."""
        return search_runs(self.client, experiment_id, kind=kind)

    def find_running(self, experiment_id: str, job: int, kind: Kind) -> str | None:
        """The first run that says it is at a job (the tag `rankwise.job`); None where there is none.

        Raises:
            TrackingError: The server cannot be reached.
        """
        found = search_runs(self.client, experiment_id, kind=kind, tags={JOB: str(job)}, status="RUNNING")
        return found[0].run_id if found else None

    def sync(self, timeout: float = 60.0) -> SyncReport:
        """Deliver what earlier processes left in the outbox, in `timeout` seconds at most.

        Files of living processes are not touched.
        """
        deadline = time.monotonic() + timeout
        left = find_left(self.settings)
        problems = list(left.problems)
        delivered: list[str] = []
        waiting: dict[str, str] = {}
        # What runs of this process that have ended could not deliver belongs to it too.
        adopted = self._sender.left
        away = unreachable(self.settings.tracking_uri) if left.outboxes or adopted else None
        for outbox in left.outboxes:
            replay = Replay(outbox)
            if reason := away or self._not_now(replay):
                waiting[outbox.run_id] = reason
                outbox.close()
            else:
                self._sender.add(outbox, missing=replay.missing)
                adopted.append(outbox)
        for outbox in adopted:
            done = self._sender.drain(outbox, 0.0 if away else max(0.0, deadline - time.monotonic()))
            problems += [f"run {outbox.run_id}: {refusal}" for refusal in self._sender.let_go(outbox)]
            if done:
                delivered.append(outbox.run_id)
            else:
                waiting[outbox.run_id] = away or self._sender.outage or "the store is slow"
        return SyncReport(delivered=tuple(delivered), waiting=waiting, problems=tuple(problems))

    def _not_now(self, replay: Replay) -> str | None:
        """Why an outbox must wait: a later attempt is at work on its run."""
        try:
            return "a later attempt is at work on this run" if replay.overtaken(self.client) else None
        except TrackingError as error:
            # A run that is gone is for the sender, which puts aside what is refused.
            return None if is_final(error.__cause__ or error) else str(error)

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
        """A local store keeps artifacts in the home; a server decides for itself."""
        if not self.settings.local_store:
            return None
        folder = _FOREIGN.sub("_", name)
        if folder != name or folder.startswith("."):
            folder = f"{folder.lstrip('.')}-{sha256(name.encode()).hexdigest()[:8]}"
        return (self.settings.artifacts / folder).as_uri()


def _experiment_tags(spec: ExperimentSpec | None) -> dict[str, str]:
    # The kind keeps the UI from asking whether this is about training or about language model applications.
    tags = {EXPERIMENT_KIND: TRAINING_KIND}
    if spec is not None:
        tags[VIEW_TAG] = table_view(spec)
    if spec is not None and spec.description:
        tags[NOTE] = shorten(storable(spec.description))
    return tags
