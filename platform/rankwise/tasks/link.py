"""An arm that another experiment has trained already: a run of its own here, pointing there, in place of training."""

from __future__ import annotations

from rankwise.exceptions import JobError
from rankwise.jobs.job import Job
from rankwise.tasks.context import Context
from rankwise.tasks.payload import Work
from rankwise.tracking.descriptions import arm_note
from rankwise.tracking.query import get_run, search_runs
from rankwise.tracking.runs import SPEC_HASH

LINKED = "rankwise.linked_run"


def link_run(context: Context, trained: Job, work: Work) -> None:
    """Make the run that stands for an arm trained elsewhere, if it is not there yet."""
    assert trained.result is not None
    if _of_arm(context, work):
        return
    there = get_run(context.store.client, trained.result["run_id"])
    run = context.store.start_run(
        work.experiment_id,
        work.run_name,
        parent=work.parent_run_id,
        params=work.arm.params,
        tags={LINKED: there.run_id, "rankwise.model_uri": trained.result["model_uri"]},
        description=arm_note(work.arm, model_uri=trained.result["model_uri"]),
        kind="train",
        spec_hash=work.arm.spec_hash,
        system_metrics=False,
    )
    kept = {key: value for key, value in there.metrics.items() if key.startswith(("train.", "adapter."))}
    run.metrics(kept, int(trained.result["steps"]))
    run.end("FINISHED")
    context.voice.say(f"{work.run_name}: trained in experiment {trained.experiment!r} already, linked")


def run_of_arm(context: Context, work: Work) -> str:
    """The id of the run that stands for an arm in the experiment of `work`.

    Raises:
        JobError: There is none.
    """
    runs = _of_arm(context, work)
    if not runs:
        raise JobError(
            f"arm {work.arm.short} is trained, but experiment {work.experiment!r} has no run of it: was the MLflow "
            "store exchanged or a run deleted? Restore it, or start with a fresh RANKWISE_HOME"
        )
    return runs[-1]


def _of_arm(context: Context, work: Work) -> list[str]:
    """Run ids, oldest first, the finished ones last."""
    runs = search_runs(context.store.client, work.experiment_id, kind="train", tags={SPEC_HASH: work.arm.spec_hash})
    return [run.run_id for run in sorted(runs, key=lambda run: run.status == "FINISHED")]
