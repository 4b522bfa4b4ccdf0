"""What another experiment has done already: runs of its own here, pointing there, in place of doing it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rankwise.evaluation.gather import EVAL_HASH, LINKED
from rankwise.evaluation.metrics import MetricValue
from rankwise.evaluation.summary import to_tracking
from rankwise.exceptions import JobError
from rankwise.jobs.job import Job, JobState
from rankwise.tasks.context import Context
from rankwise.tasks.payload import Work
from rankwise.tracking.descriptions import arm_note, base_note
from rankwise.tracking.query import RunRecord, get_run, search_runs
from rankwise.tracking.runs import SPEC_HASH


def link_done(context: Context, pairs: Sequence[tuple[Work, Job]], evaluations: Iterable[Job]) -> None:
    """Give this experiment a run, with results, for everything that the queue knows as done elsewhere.

    Args:
        context: The stores.
        pairs: Each arm's work with its train job.
        evaluations: The evaluate jobs of the arms and of the bare base.
    """
    work = pairs[0][0]
    runs = context.store.runs(work.experiment_id)
    own = {run.spec_hash for run in runs if run.kind == "train"}
    for each, train in pairs:
        if train.state is JobState.SUCCEEDED and train.spec_hash not in own:
            _link_arm(context, each, train)
    have = {run.tags.get(EVAL_HASH) for run in runs}
    works = {each.arm.eval_hash(): each for each, _ in pairs}
    for evaluation in evaluations:
        if evaluation.state is JobState.SUCCEEDED and evaluation.spec_hash not in have:
            _link_results(context, works.get(evaluation.spec_hash), work, evaluation)


def run_of_arm(context: Context, work: Work) -> str:
    """The id of the run that stands for an arm in the experiment of `work`.

    Raises:
        JobError: There is none.
    """
    runs = search_runs(context.store.client, work.experiment_id, kind="train", tags={SPEC_HASH: work.arm.spec_hash})
    if not runs:
        raise JobError(
            f"arm {work.arm.short} is trained, but experiment {work.experiment!r} has no run of it: was the MLflow "
            "store exchanged or a run deleted? Restore it, or start with a fresh RANKWISE_HOME"
        )

    def order(run: RunRecord) -> bool:
        return run.status == "FINISHED"

    return sorted(runs, key=order)[-1].run_id


def _link_arm(context: Context, work: Work, train: Job) -> None:
    assert train.result is not None
    there = get_run(context.store.client, train.result["run_id"])
    run = context.store.start_run(
        work.experiment_id,
        work.run_name,
        parent=work.parent_run_id,
        params=work.arm.params,
        tags={LINKED: there.run_id, "rankwise.model_uri": train.result["model_uri"]},
        description=arm_note(work.arm, model_uri=train.result["model_uri"]),
        kind="train",
        spec_hash=work.arm.spec_hash,
        system_metrics=False,
    )
    kept = {key: value for key, value in there.metrics.items() if key.startswith(("train.", "adapter."))}
    run.metrics(kept, int(train.result["steps"]))
    run.end("FINISHED")
    context.voice.say(f"{work.run_name}: trained in experiment {train.experiment!r} already, linked")


def _link_results(context: Context, own: Work | None, any_work: Work, evaluation: Job) -> None:
    """Write an evaluation's results to the arm's run, or to a run of the bare base."""
    result = evaluation.result or {}
    values = to_tracking({key: MetricValue(**value) for key, value in result["metrics"].items()})
    if own is not None:
        run = context.store.resume_run(run_of_arm(context, own), system_metrics=False, repeats=False)
    else:
        run = context.store.start_run(
            any_work.experiment_id,
            "base alone",
            parent=any_work.parent_run_id,
            tags={LINKED: result["run_id"]},
            description=base_note(any_work.arm),
            kind="base",
            system_metrics=False,
        )
    run.metrics(values, int(result["step"]))
    run.tags({EVAL_HASH: evaluation.spec_hash})
    run.end("FINISHED")
