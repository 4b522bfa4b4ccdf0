"""What a job's row says about its work, so that any worker can do it with nothing but the row."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from rankwise.experiment.arm import ArmSpec
from rankwise.jobs.job import Job, JobKind, NewJob


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
