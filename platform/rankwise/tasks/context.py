"""What every task needs: settings, the queue, the MLflow store, a voice, and the wish to stop.

- What a job's row says about its work, so that any worker can do it with nothing but the row.
- How an error that cut a job off is told to the queue and to people.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Self

from rankwise.exceptions import RankwiseError, is_out_of_memory
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment, parse_experiment
from rankwise.jobs.job import Job, JobKind, NewJob, Outcome, Worker
from rankwise.jobs.store import JobStore
from rankwise.reporter import Reporter
from rankwise.settings import Settings
from rankwise.tracking.store import Store
from rankwise.worker.child import LESS_MEMORY
from rankwise.worker.local_placer import this_worker
from rankwise.worker.protocol import Failure

_MOST_EXPERIMENTS = 16


class Experiments:
    """The experiments that this process knows, by the text of their definition; the ones used last stay."""

    def __init__(self) -> None:
        """Empty."""
        self._known: dict[str, Experiment] = {}

    def add(self, experiment: Experiment) -> None:
        """Keep one that was checked already."""
        self._keep(experiment.text, experiment)

    def get(self, definition: str, name: str) -> Experiment:
        """The experiment of a definition, parsed and checked only the first time; `name` is for messages.

        Raises:
            ConfigError: It is not valid.
        """
        experiment = self._known.pop(definition, None) or parse_experiment(definition, name)
        self._keep(definition, experiment)
        return experiment

    def _keep(self, definition: str, experiment: Experiment) -> None:
        self._known.pop(definition, None)
        self._known[definition] = experiment
        if len(self._known) > _MOST_EXPERIMENTS:
            del self._known[next(iter(self._known))]


@dataclass(frozen=True, kw_only=True)
class Context:
    """One process's connections. `stop` is set when a person or the system wants it to end."""

    settings: Settings
    store: Store
    queue: JobStore
    voice: Reporter
    stop: threading.Event = field(default_factory=threading.Event)
    experiments: Experiments = field(default_factory=Experiments)

    def experiment_of(self, work: Work) -> Experiment:
        """The experiment that a job is a part of.

        Raises:
            ConfigError: Its definition is no longer valid.
        """
        return self.experiments.get(work.definition, f"the definition of {work.experiment}")

    @property
    def worker(self) -> Worker:
        """Who this process is in the queue."""
        return this_worker()


@contextmanager
def open_context(settings: Settings, voice: Reporter, stop: threading.Event | None = None) -> Iterator[Context]:
    """Open the stores, creating them in a fresh home, and close them at the end.

    Raises:
        JobError: The queue's database cannot be used.
        TrackingError: The MLflow store cannot be reached.
        StorageError: The home cannot be written.
    """
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        with Store.open(settings) as store:
            yield Context(settings=settings, store=store, queue=queue, voice=voice, stop=stop or threading.Event())
    finally:
        queue.close()


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a train or evaluate job.

    Attributes:
        arm: The arm; of a job that evaluates the bare base, any arm over that base and those rows.
        bare: Whether the bare base is evaluated and not the arm's adapter.
        experiment: Name of the definition.
        experiment_id: Of MLflow.
        parent_run_id: Run of the sweep.
        run_name: As shown in the UI.
        register_as: Name of the registered model, or None.
        log_examples: Whether texts of rows may be stored in MLflow.
        definition: The resolved experiment file.
        stops: Steps after which the arm pauses until it is decided whether it goes on (a rung each), ascending.
        group: Names the arms that this one is compared with when it pauses; None without early stopping.
        command: How a person starts the sweep again, for its note.
    """

    arm: ArmSpec
    bare: bool = False
    experiment: str
    experiment_id: str
    parent_run_id: str
    run_name: str
    register_as: str | None
    log_examples: bool
    definition: str
    stops: tuple[int, ...] = ()
    group: str | None = None
    command: str = ""

    @classmethod
    def of(cls, job: Job) -> Self:
        """Read a job's row, also one that an older release wrote."""
        known = {each.name for each in fields(cls)}
        values = {key: value for key, value in job.spec.items() if key in known}
        arm = ArmSpec.model_validate_json(values["arm"])
        return cls(**{**values, "arm": arm, "stops": tuple(values.get("stops", ()))})

    def stop_after(self, step: int) -> int | None:
        """The next rung of an arm that has paused at `step` (0 at the beginning); None: it trains to its end."""
        return next((stop for stop in self.stops if stop > step), None)

    def train_job(self, *, priority: int = 0, after: tuple[int, ...] = ()) -> NewJob:
        """The job that trains the arm."""
        return self._job(JobKind.TRAIN, self.arm.spec_hash, self.arm.pack_key, priority, after)

    def evaluate_job(self, after: tuple[int, ...] = (), *, priority: int = 0) -> NewJob:
        """The job that evaluates the arm's adapter, or the bare base. Evaluations over equal rows share a pack."""
        base = self.arm.base_eval_hash()
        return self._job(JobKind.EVALUATE, base if self.bare else self.arm.eval_hash(), base, priority, after)

    def _job(self, kind: JobKind, spec_hash: str, pack_key: str, priority: int, after: tuple[int, ...]) -> NewJob:
        spec: dict[str, Any] = {
            "arm": self.arm.to_json(),
            "bare": self.bare,
            "experiment": self.experiment,
            "experiment_id": self.experiment_id,
            "parent_run_id": self.parent_run_id,
            "run_name": self.run_name,
            "register_as": self.register_as,
            "log_examples": self.log_examples,
            "definition": self.definition,
            "stops": list(self.stops),
            "group": self.group,
            "command": self.command,
        }
        return NewJob(
            kind=kind,
            experiment=self.experiment,
            spec_hash=spec_hash,
            spec=spec,
            pack_key=pack_key,
            priority=priority,
            after=after,
        )


_CONFIGURATION, _ENVIRONMENT = 2, 3


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of an attempt that ended with an error.

    | error | outcome |
    |---|---|
    | an interruption | preempted: goes on later, counts as no failure |
    | the environment (disk, store, hub) | preempted: it is not the job's fault, and waits until that is mended |
    | the definition or the rows | fatal: trying again cannot help |
    | anything else, memory too | failed: tried again with backoff |
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return Outcome.PREEMPTED
    if isinstance(error, RankwiseError):
        return {_CONFIGURATION: Outcome.FATAL, _ENVIRONMENT: Outcome.PREEMPTED}.get(error.exit_code, Outcome.FAILED)
    return Outcome.FAILED


def text_of(error: BaseException) -> str:
    """An error in words: as it is where it is for people, with its kind where it is a bug, with advice for memory."""
    if isinstance(error, RankwiseError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory: {str(error).partition(chr(10))[0]}; {LESS_MEMORY}"
    return f"{type(error).__name__}: {error}"


def failure_of(error: BaseException) -> Failure:
    """An error as the parent is told of it."""
    outcome = outcome_of(error)
    interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
    for_people = interrupted or isinstance(error, RankwiseError) or is_out_of_memory(error)
    return Failure(
        outcome=str(outcome),
        type="KeyboardInterrupt" if interrupted else _public_name(error),
        text="interrupted" if interrupted else text_of(error),
        environment=isinstance(error, RankwiseError) and outcome is Outcome.PREEMPTED,
        trace=None if for_people else "".join(traceback.format_exception(error)),
    )


def _public_name(error: BaseException) -> str:
    """The class that the parent raises again: an error for people may be of a class that only its own package knows."""
    public = (each.__name__ for each in type(error).__mro__ if each.__module__ == RankwiseError.__module__)
    return next(public, type(error).__name__)
