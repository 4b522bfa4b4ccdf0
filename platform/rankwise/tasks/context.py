"""What tasks share: `Context` (settings, stores, reporter), `ArmWork` (the payload of a job's row), error outcomes."""

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
    """A cache of parsed experiments by definition text; keeps the most recently used."""

    def __init__(self) -> None:
        """Start empty."""
        self._known: dict[str, Experiment] = {}

    def add(self, experiment: Experiment) -> None:
        """Add an experiment that was validated already."""
        self._keep(experiment.text, experiment)

    def get(self, definition: str, name: str) -> Experiment:
        """Return the experiment of a definition, parsed only once; `name` is for messages."""
        experiment = self._known.pop(definition, None) or parse_experiment(definition, name, recorded=True)
        self._keep(definition, experiment)
        return experiment

    def _keep(self, definition: str, experiment: Experiment) -> None:
        self._known.pop(definition, None)
        self._known[definition] = experiment
        if len(self._known) > _MOST_EXPERIMENTS:
            del self._known[next(iter(self._known))]


@dataclass(frozen=True, kw_only=True)
class Context:
    """One process's connections. `stop` is set when the process should end."""

    settings: Settings
    store: Store
    queue: JobStore
    reporter: Reporter
    stop: threading.Event = field(default_factory=threading.Event)
    experiments: Experiments = field(default_factory=Experiments)

    def experiment_of(self, work: ArmWork) -> Experiment:
        """Return the experiment that a job belongs to; raises `ConfigError` if its definition is no longer valid."""
        return self.experiments.get(work.definition, f"the definition of {work.experiment}")

    @property
    def worker(self) -> Worker:
        """This process as a worker in the queue."""
        return this_worker()


@contextmanager
def open_context(settings: Settings, reporter: Reporter, stop: threading.Event | None = None) -> Iterator[Context]:
    """Open the stores, creating them in a fresh home, and close them on exit."""
    queue = JobStore(settings.database_url, lock=settings.home / "queue.lock")
    try:
        with Store.open(settings) as store:
            yield Context(
                settings=settings, store=store, queue=queue, reporter=reporter, stop=stop or threading.Event()
            )
    finally:
        queue.close()


@dataclass(frozen=True, kw_only=True)
class ArmWork:
    """Payload of a train or evaluate job. Its row alone lets any worker do the job.

    Attributes:
        arm: The arm; for an evaluation of the bare base, any arm over that base and those rows.
        log_examples: Whether row texts may be stored in MLflow.
        definition: The resolved experiment file.
        stops: Ascending steps of the rungs: the arm pauses after each until it is promoted or pruned.
        group: Names the arms that it is compared with at rungs; None without early stopping.
        command: Command that restarts the sweep, for its note.
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
        """Read a job's row, including rows written by older releases."""
        known = {attribute.name for attribute in fields(cls)}
        values = {key: value for key, value in job.spec.items() if key in known}
        arm = ArmSpec.from_json(values["arm"])
        return cls(**{**values, "arm": arm, "stops": tuple(values.get("stops", ()))})

    def stop_after(self, step: int) -> int | None:
        """The next rung after `step`; None if the arm trains to its end."""
        return next((stop for stop in self.stops if stop > step), None)

    def train_job(self, *, priority: int = 0, after: tuple[int, ...] = ()) -> NewJob:
        """The job that trains the arm."""
        return self._job(JobKind.TRAIN, self.arm.spec_hash, self.arm.pack_key, priority, after)

    def evaluate_job(self, after: tuple[int, ...] = (), *, priority: int = 0) -> NewJob:
        """The job that evaluates the arm's adapter or the bare base. Evaluations over equal rows share a pack key."""
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
    | interruption | preempted: resumes later, not counted as a failure |
    | environment (disk, store, hub) | preempted: resumes when the environment works again |
    | definition or rows | fatal: a retry cannot help |
    | anything else, including out of memory | failed: retried with backoff |
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return Outcome.PREEMPTED
    if isinstance(error, RankwiseError):
        return {_CONFIGURATION: Outcome.FATAL, _ENVIRONMENT: Outcome.PREEMPTED}.get(error.exit_code, Outcome.FAILED)
    return Outcome.FAILED


def error_text(error: BaseException) -> str:
    """An error as text: with advice if memory ran out, with its type if it is a bug."""
    if isinstance(error, RankwiseError):
        return str(error)
    if is_out_of_memory(error):
        return f"out of memory: {str(error).partition(chr(10))[0]}; {LESS_MEMORY}"
    return f"{type(error).__name__}: {error}"


def failure_of(error: BaseException) -> Failure:
    """An error as the child reports it to its parent."""
    outcome = outcome_of(error)
    interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
    for_people = interrupted or isinstance(error, RankwiseError) or is_out_of_memory(error)
    return Failure(
        outcome=str(outcome),
        type="KeyboardInterrupt" if interrupted else _public_name(error),
        text="interrupted" if interrupted else error_text(error),
        environment=isinstance(error, RankwiseError) and outcome is Outcome.PREEMPTED,
        trace=None if for_people else "".join(traceback.format_exception(error)),
    )


def _public_name(error: BaseException) -> str:
    """The nearest class of `rankwise.exceptions`, which the parent can raise again."""
    public = (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == RankwiseError.__module__)
    return next(public, type(error).__name__)
