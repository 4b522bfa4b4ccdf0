"""What the jobs of the queue need on this machine and in MLflow, for those who clean up."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rankwise.jobs.job import Job, JobState


@dataclass(kw_only=True)
class Needs:
    """What unfinished jobs need, and what ended ones have made.

    Attributes:
        jobs: Numbers of the unfinished jobs.
        arms: The first 12 digits of the spec hashes of arms that are to be trained or evaluated.
        bases: Source and revision of their bases.
        adapters: Names of the directories of adapters that they start from.
        since: When the oldest unfinished job was submitted, seconds since the epoch; None without one.
        models: Run to the LoggedModel that its succeeded train job counts as its result.
        ended: Runs of train jobs that have ended, by (job, run), with their state.
        experiments: Ids of all experiments.
    """

    jobs: set[int] = field(default_factory=set)
    arms: set[str] = field(default_factory=set)
    bases: set[tuple[str, str | None]] = field(default_factory=set)
    adapters: set[str] = field(default_factory=set)
    since: float | None = None
    models: dict[str, str] = field(default_factory=dict)
    ended: dict[tuple[int, str], JobState] = field(default_factory=dict)
    experiments: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, jobs: Iterable[Job]) -> Needs:
        """Read them out of rows."""
        needs = cls()
        for job in jobs:
            if "experiment_id" in job.spec:
                needs.experiments.add(str(job.spec["experiment_id"]))
            if not job.ended:
                needs._add(job)
            elif job.mlflow_run_id is not None:
                needs.ended[job.id, job.mlflow_run_id] = job.state
                if job.state is JobState.SUCCEEDED and (model := (job.result or {}).get("model_id")):
                    needs.models[job.mlflow_run_id] = str(model)
        return needs

    def _add(self, job: Job) -> None:
        self.since = job.created_at if self.since is None else min(self.since, job.created_at)
        self.jobs.add(job.id)
        self.arms.add(job.spec_hash[:12])
        if (arm := _arm(job)) is not None:
            self.bases.add((str(arm["base_model"]), arm.get("base_model_revision")))
            if arm.get("init_from"):
                self.adapters.add(adapter_directory(str(arm["init_from"])))


def adapter_directory(uri: str) -> str:
    """The name of the cache's directory for a registered adapter that an arm starts from."""
    return uri.replace("models:/", "").replace("/", "-")


def _arm(job: Job) -> dict[str, Any] | None:
    # Not as an ArmSpec: a row that another release wrote must not keep anybody from cleaning up.
    arm = job.spec.get("arm")
    values = json.loads(arm) if isinstance(arm, str) else arm
    return values if isinstance(values, dict) and "base_model" in values else None
