"""Seeds on demand: which arms a sweep with an `answer` section trains next.

1. With tuned fields, all arms are trained with the pilot seeds, which choose each rank's values.
2. The first look needs `seeds.first` seeds: of all arms, or of those at the chosen values.
3. If it leaves a rank undecided, the last look needs `seeds.most`: of every configuration that the answer compares,
   also those of decided ranks. The variance over seeds is pooled over ranks, which takes the seeds that all of them
   have.

Nothing is stored. Stages are derived from the definition and the results of ended arms, so that every worker derives
the same ones, and a decision lost in a crash is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rankwise.evaluation.answer_arms import NoAnswer, ReadInfluences, sort_arms
from rankwise.evaluation.answer_text import Answer, outlook
from rankwise.evaluation.compare import ArmRecord, Comparison, compare
from rankwise.evaluation.findings import find_answer
from rankwise.evaluation.gather import MORE_SEEDS, Influences, gather, read_influences, typed_params
from rankwise.exceptions import ConfigError
from rankwise.experiment.answer_plan import AnswerPlan, answer_plan, with_seeds
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment, Labelled
from rankwise.experiment.metric_names import greater_is_better
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.tasks.context import ArmWork, Context
from rankwise.tasks.evaluation_setup import DEFINITION, read_artifact
from rankwise.tracking.query import get_run

StageName = Literal["pilot", "first", "most"]
Results = Callable[[Sequence[ArmSpec]], Comparison | None]
"""Compares the given arms; None unless all of them have ended."""


@dataclass(frozen=True, kw_only=True)
class SeedStage:
    """Arms that are trained together before the next decision.

    Attributes:
        seeds: Their seeds.
        answer: For the last look: the answer of the first one, which leaves a rank undecided.
    """

    name: StageName
    arms: tuple[Labelled, ...]
    seeds: tuple[int, ...]
    answer: Answer | None = None


def seed_stages(
    defined: Sequence[Labelled],
    plan: AnswerPlan,
    results: Results,
    read: ReadInfluences,
    *,
    more_seeds: bool = True,
) -> tuple[SeedStage, ...]:
    """The stages that have ended, and the next one.

    Args:
        defined: The arms of the definition, without their seeds.
        plan: The plan of the answer, whose seeds are not fixed.
        results: Compares the arms of the stages so far.
        read: Reads the influences of single rows.
        more_seeds: Whether the last look may follow.
    """
    stages: list[SeedStage] = []

    def compared() -> Comparison | None:
        return results([arm for stage in stages for _, arm in stage.arms])

    chosen = tuple(defined)
    if plan.pilot:
        stages.append(_stage("pilot", chosen, plan.pilot))
        comparison = compared()
        if comparison is None:
            return tuple(stages)
        try:
            pilots = sort_arms(comparison, plan).pilots
        except NoAnswer:
            return tuple(stages)
        chosen = _configurations_of(chosen, stages, pilots)
    first, *later = plan.looks
    stages.append(_stage("first", chosen, first))
    if not later or not more_seeds:
        return tuple(stages)
    comparison = compared()
    if comparison is None:
        return tuple(stages)
    answer = find_answer(comparison, read)
    if answer.decision is None or answer.arms is None or not answer.decision.undecided:
        return tuple(stages)
    cells = [arm for cell in answer.arms.cells.values() for arm in cell]
    chosen = _configurations_of(chosen, stages, cells)
    stages.append(_stage("most", chosen, [seed for seed in plan.seeds if seed not in first], answer))
    return tuple(stages)


def _stage(name: StageName, arms: Sequence[Labelled], seeds: Sequence[int], answer: Answer | None = None) -> SeedStage:
    return SeedStage(name=name, arms=with_seeds(arms, seeds), seeds=tuple(seeds), answer=answer)


def _configurations_of(
    arms: Sequence[Labelled], stages: Sequence[SeedStage], records: Sequence[ArmRecord]
) -> tuple[Labelled, ...]:
    """Those arms whose configuration one of the records has, with any seed."""
    hashes = {record.spec_hash for record in records}
    wanted = {arm.configuration for stage in stages for _, arm in stage.arms if arm.spec_hash in hashes}
    return tuple((label, arm) for label, arm in arms if arm.configuration in wanted)


def stages_so_far(context: Context, experiment: Experiment, *, more_seeds: bool) -> tuple[SeedStage, ...] | None:
    """The stages of a sweep that have ended, and the next one; None if it adds no seeds.

    Raises:
        TrackingError: All arms of a stage have ended, and their results cannot be read.
    """
    plan = answer_plan(experiment)
    if plan is None or plan.fixed:
        return None

    def results(arms: Sequence[ArmSpec]) -> Comparison | None:
        return _results(context, experiment, plan, arms)

    def read(arms: Sequence[ArmRecord]) -> Mapping[str, Influences]:
        return read_influences(context.store, arms, experiment.spec.evaluation.primary_metric)

    return seed_stages(experiment.labelled_arms, plan, results, read, more_seeds=more_seeds)


def _results(context: Context, experiment: Experiment, plan: AnswerPlan, arms: Sequence[ArmSpec]) -> Comparison | None:
    """Compare arms that have all ended by the queue, which is asked first: most calls come before that."""
    trains = context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in arms])
    evaluations = context.queue.find(JobKind.EVALUATE, [arm.eval_hash() for arm in arms])
    failed: dict[str, Job] = {}
    for arm in arms:
        train, evaluation = trains.get(arm.spec_hash), evaluations.get(arm.eval_hash())
        if train is None:
            return None
        if train.state in {JobState.FAILED, JobState.CANCELLED}:
            failed[arm.spec_hash] = train
        elif evaluation is None or not evaluation.ended:
            return None
    try:
        known = gather(context.store, experiment.spec.name, everything=True)
        records = {arm.spec_hash: arm for arm in known.arms}
    except ConfigError:  # The experiment has no arms yet: they belong to another one, and are linked when submitted.
        records = {}
    records |= {spec_hash: _failed(records.get(spec_hash), job) for spec_hash, job in failed.items()}
    if not all(arm.spec_hash in records for arm in arms):
        return None
    primary = experiment.spec.evaluation.primary_metric
    return compare(
        experiment.spec.name,
        [records[arm.spec_hash] for arm in arms],
        primary_metric=primary,
        greater_is_better=greater_is_better(primary),
        plan=plan,
    )


def _failed(record: ArmRecord | None, job: Job) -> ArmRecord:
    """An arm as the queue has it, since its run may lag behind or not exist."""
    status = "FAILED" if job.state is JobState.FAILED else "KILLED"
    if record is not None:
        return replace(record, status=status, reason=job.error)
    params = {key: str(value) for key, value in ArmWork.of(job).arm.params.items()}
    return ArmRecord(
        spec_hash=job.spec_hash, run_id="", status=status, reason=job.error, params=typed_params(params), metrics={}
    )


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What was submitted last for a sweep: its definition, and whether seeds may be added after the first look."""

    experiment: Experiment
    more_seeds: bool


def last_submission(context: Context, work: ArmWork) -> Submission | None:
    """The last submission of the sweep of a job; None if it adds no seeds.

    A job keeps the definition that queued it, and a later one may differ in its `answer` section. So the sweep's run
    has the last one.

    Raises:
        TrackingError: The run cannot be read.
    """
    defined = context.experiment_of(work)
    if len({arm.lora.r for arm in defined.arms}) < 2 or defined.is_search:
        return None
    tags = get_run(context.store.client, work.parent_run_id).tags
    if MORE_SEEDS not in tags:
        return None
    text = read_artifact(context, work.parent_run_id, DEFINITION)
    if text is None:
        return None
    experiment = context.experiments.get(text.decode(), f"the definition of {work.experiment}")
    if not experiment.adds_seeds:
        return None
    return Submission(experiment=experiment, more_seeds=json.loads(tags[MORE_SEEDS]))


def describe_stage(plan: AnswerPlan, stage: SeedStage, steps: int | None, together: int) -> str:
    """What a stage trains, why, and what it costs.

    Args:
        plan: The plan of the answer.
        stage: The stage.
        steps: Of each arm, if known.
        together: The most arms that are trained together.
    """
    count = len(stage.arms)
    configurations = count // len(stage.seeds)
    seeds = f"{'seeds' if len(stage.seeds) > 1 else 'seed'} {_range(stage.seeds)}"
    what = f"{seeds} of {configurations} configurations: {count} arms{seed_cost(count, steps, together)}"
    match stage.name:
        case "pilot":
            return f"pilot seeds choose {', '.join(plan.tune)} of each rank: {what}"
        case "first":
            return f"first look at the ranks: {what}"
    assert stage.answer is not None, "the last look follows from the first one"
    assert stage.answer.decision is not None, "an answer that leaves a rank undecided"
    named = stage.answer.rank is not None
    undecided = [f"r = {each.rank:g} is undecided." for each in stage.answer.decision.undecided if named]
    parts = [stage.answer.text, *undecided, *outlook(plan, stage.answer.decision), f"Next: {what}"]
    return f"first look: {' '.join(parts)}"


def _range(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 2 else " and ".join(map(str, seeds))


def seed_cost(arms: int, steps: int | None, together: int) -> str:
    """What arms cost, trained one by one and together, as the end of a sentence."""
    if steps is None:
        return f", of which up to {together} share a step"
    alone, shared = arms * steps, -(-arms // together) * steps
    return f" of {steps:,} steps; up to {together} share a step, so at least {shared:,} steps instead of {alone:,}"
