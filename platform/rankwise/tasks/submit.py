"""Submission of sweeps: a definition becomes jobs in the queue and planned runs in MLflow.

`prepare` resolves pins and checks rows; `submit` creates the sweep's run; `queue_arms` queues training, evaluation and
the bare base, and reuses work of other experiments. Repeating a submission completes it or adds nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rankwise.assets.layout import read_json
from rankwise.data.preflight import Report
from rankwise.evaluation.gather import (
    ANSWER_PLAN,
    BASE_EVALUATIONS,
    DEFAULT_PRIMARY_METRIC,
    EARLIER_PLANS,
    EVAL_HASH,
    LINKED,
    MORE_SEEDS,
    PRIMARY_METRIC,
)
from rankwise.evaluation.metrics import MetricValue, to_tracking
from rankwise.exceptions import JobError
from rankwise.experiment.answer_plan import PROPOSED_MARGIN, AnswerPlan, answer_plan
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment
from rankwise.experiment.hashing import digest
from rankwise.experiment.rules import rung_advice
from rankwise.experiment.schema import RENDERING
from rankwise.jobs.job import MAX_ARMS, Job, JobKind, JobState
from rankwise.modeling.adapter import embedding_rows
from rankwise.modeling.base import load_tokenizer
from rankwise.tasks.adaptive_sweep import SweepArm, arms_so_far, is_pruned
from rankwise.tasks.answer_seeds import describe_stage, seed_cost, stages_so_far
from rankwise.tasks.arm_rows import ArmSources, RowsCache, check_names, check_rows, find_sources, pin
from rankwise.tasks.base_holder import BaseHolder
from rankwise.tasks.context import ArmWork, Context
from rankwise.tasks.evaluation_setup import DEFINITION
from rankwise.tracking.notes import arm_note, base_note, sweep_note
from rankwise.tracking.provenance import collect
from rankwise.tracking.query import RunRecord, get_run, member_tags, search_runs, sweep_tags
from rankwise.tracking.registry import JOB
from rankwise.tracking.run import SPEC_HASH, Run


def reuse_finished(context: Context, pairs: Sequence[tuple[ArmWork, Job]], evaluations: Iterable[Job]) -> None:
    """Create runs in this experiment, with results, for work that another experiment has finished."""
    work = pairs[0][0]
    runs = context.store.runs(work.experiment_id)
    own = {run.spec_hash for run in runs if run.kind == "train"}
    for arm_work, train in pairs:
        if train.state is JobState.SUCCEEDED and train.spec_hash not in own:
            _link_arm(context, arm_work, train)
    recorded = {run.tags.get(EVAL_HASH) for run in runs}
    works = {arm_work.arm.eval_hash(): arm_work for arm_work, _ in pairs}
    for evaluation in evaluations:
        if evaluation.state is JobState.SUCCEEDED and evaluation.spec_hash not in recorded:
            _link_results(context, works.get(evaluation.spec_hash), work, evaluation)


def run_of_arm(context: Context, work: ArmWork) -> str:
    """ID of the arm's run in the experiment of `work`.

    Raises:
        JobError: There is no such run.
    """
    runs = search_runs(context.store.client, work.experiment_id, kind="train", tags={SPEC_HASH: work.arm.spec_hash})
    if not runs:
        raise JobError(
            f"arm {work.arm.short} is trained, but experiment {work.experiment!r} has no run of it: was the MLflow "
            "store replaced or the run deleted? Restore it, or start with a fresh RANKWISE_HOME"
        )

    def order(run: RunRecord) -> bool:
        return run.status == "FINISHED"

    return sorted(runs, key=order)[-1].run_id


def _link_arm(context: Context, work: ArmWork, train: Job) -> None:
    assert train.result is not None
    source = get_run(context.store.client, train.result["run_id"])
    run = context.store.start_run(
        work.experiment_id,
        work.run_name,
        parent=work.parent_run_id,
        params=work.arm.params,
        tags={LINKED: source.run_id, "rankwise.model_uri": train.result["model_uri"]},
        description=arm_note(work.arm, model_uri=train.result["model_uri"]),
        kind="train",
        spec_hash=work.arm.spec_hash,
        system_metrics=False,
    )
    metrics = {key: value for key, value in source.metrics.items() if key.startswith(("train.", "adapter."))}
    run.metrics(metrics, int(train.result["steps"]))
    run.end("FINISHED")
    context.reporter.say(f"{work.run_name}: already trained in experiment {train.experiment!r}; its result is reused")


def _link_results(context: Context, own: ArmWork | None, any_work: ArmWork, evaluation: Job) -> None:
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


_SCHEDULED_AHEAD = 16
"""As many jobs as a worker claims at once."""


def queue_arms(
    context: Context, any_work: ArmWork, arms: Sequence[SweepArm], *, priority: int = 0, after: Sequence[int] = ()
) -> list[Job]:
    """Queue the missing jobs of some arms of a sweep; returns all their jobs in their current state.

    Arms that were pruned in this sweep, or that a later round was proposed from, are not retried. `any_work` is the
    payload of any arm of the sweep; jobs in `after` must succeed first.
    """
    works = [
        replace(
            any_work,
            arm=sweep_arm.arm,
            bare=False,
            run_name=sweep_arm.label or f"arm {sweep_arm.arm.short}",
            stops=sweep_arm.stops,
            group=sweep_arm.group,
        )
        for sweep_arm in arms
    ]
    known = context.queue.find(JobKind.TRAIN, [sweep_arm.arm.spec_hash for sweep_arm in arms])
    decided = {
        sweep_arm.arm.spec_hash for sweep_arm in arms if _is_decided(sweep_arm, known.get(sweep_arm.arm.spec_hash))
    }
    open_works = [work for work in works if work.arm.spec_hash not in decided]
    submitted = context.queue.submit(
        [work.train_job(priority=priority, after=tuple(after)) for work in open_works], again=True
    )
    trains = {**known, **{job.spec_hash: job for job in submitted}}
    _schedule(context, any_work.experiment_id, [(work, trains[work.arm.spec_hash]) for work in open_works])
    bare = {
        sweep_arm.arm.base_eval_hash(): replace(
            any_work, arm=sweep_arm.arm, bare=True, run_name="base alone", stops=(), group=None
        )
        for sweep_arm in arms
    }
    evaluate = [work.evaluate_job(tuple(after), priority=priority) for work in bare.values()]
    evaluate += [work.evaluate_job(after=(trains[work.arm.spec_hash].id,), priority=priority) for work in open_works]
    evaluations = context.queue.submit(evaluate, again=True)
    ended = context.queue.find(
        JobKind.EVALUATE, [work.arm.eval_hash() for work in works if work.arm.spec_hash in decided]
    )
    evaluations += ended.values()
    pairs = [(work, trains[work.arm.spec_hash]) for work in works]
    reuse_finished(context, pairs, evaluations)
    ids = [*(train.id for _, train in pairs), *(evaluation.id for evaluation in evaluations)]
    # Read again: runs were recorded since, and a worker may have started.
    current = {job.id: job for job in context.queue.jobs(ids=ids)}
    return [current[sweep_arm] for sweep_arm in ids]


def all_done(context: Context, arms: Sequence[SweepArm]) -> bool:
    """Whether nothing is left to do for these arms."""
    trains = context.queue.find(JobKind.TRAIN, [sweep_arm.arm.spec_hash for sweep_arm in arms])
    hashes = [
        *(sweep_arm.arm.eval_hash() for sweep_arm in arms),
        *{sweep_arm.arm.base_eval_hash() for sweep_arm in arms},
    ]
    evaluations = context.queue.find(JobKind.EVALUATE, hashes)
    ended = {
        sweep_arm.arm.eval_hash()
        for sweep_arm in arms
        if (train := trains.get(sweep_arm.arm.spec_hash)) is not None and _is_pruned_here(sweep_arm, train)
    }
    ended |= {value for value, job in evaluations.items() if job.state is JobState.SUCCEEDED}
    return ended.issuperset(hashes)


def _is_decided(sweep_arm: SweepArm, train: Job | None) -> bool:
    return train is not None and (sweep_arm.settled or _is_pruned_here(sweep_arm, train))


def _is_pruned_here(sweep_arm: SweepArm, train: Job) -> bool:
    return sweep_arm.group is not None and is_pruned(train, sweep_arm.group)


def _schedule(context: Context, experiment_id: str, pairs: Sequence[tuple[ArmWork, Job]]) -> None:
    """Create the runs of the arms that are claimed first, so that an unavailable server does not delay them later."""
    queued = [(work, job) for work, job in pairs if job.state is JobState.QUEUED]
    unscheduled = [(work, job) for work, job in queued if job.mlflow_run_id is None]
    unscheduled = unscheduled[: max(0, _SCHEDULED_AHEAD - (len(queued) - len(unscheduled)))]
    if not unscheduled:
        return
    provenance = collect().tags()
    scheduled = context.store.find_scheduled(experiment_id)
    for work, job in unscheduled:
        if job.id in scheduled:
            context.queue.assign_run(job.id, scheduled[job.id])
            continue
        run = context.store.start_run(
            experiment_id,
            work.run_name,
            parent=work.parent_run_id,
            params=work.arm.params,
            tags={**provenance, JOB: job.id},
            description=arm_note(work.arm),
            kind="train",
            spec_hash=work.arm.spec_hash,
            status="SCHEDULED",
        )
        if context.queue.assign_run(job.id, run.run_id):
            run.leave(timeout=0.0)
        else:
            run.end("KILLED", "a worker started this arm in a run of its own", timeout=0.0)


logger = logging.getLogger(__name__)
SWEEP_TAG = "rankwise.sweep"


@dataclass(frozen=True, kw_only=True)
class PreparedSweep:
    """An experiment that is ready to submit.

    Attributes:
        sweep: ID of the set of arms and evaluations: the tag `rankwise.sweep` of the sweep's run.
        parent_run_id: Run of an earlier submission of the same sweep.
        previous_plan: That run's plan of the answer, as JSON; empty if it had none.
        earlier_plans: The plans before that one.
        more_seeds: Whether seeds may be added after the first look, where they are trained on demand.
        reports: Preflight report and preview by name of the rows.
    """

    experiment: Experiment
    sweep_arms: Sequence[SweepArm]
    sweep: str
    experiment_id: str
    parent_run_id: str | None
    previous_plan: str
    earlier_plans: Sequence[Any]
    more_seeds: bool
    complete: bool
    reports: dict[str, tuple[Report, str]]

    @property
    def arms(self) -> list[ArmSpec]:
        """The arms."""
        return [sweep_arm.arm for sweep_arm in self.sweep_arms]


@dataclass(frozen=True, kw_only=True)
class SubmittedSweep:
    """A submitted sweep: its experiment's name, its run, and all its jobs in their current state."""

    experiment: str
    parent_run_id: str
    jobs: tuple[Job, ...]


def prepare(
    context: Context,
    experiment: Experiment,
    rows: RowsCache,
    *,
    preflight: bool = True,
    bases: BaseHolder | None = None,
    more_seeds: bool = True,
) -> PreparedSweep:
    """Resolve pins and check the rows, before anything is queued.

    `bases` loads the base, for a process that trains next; without it only the tokenizer is read. Without `more_seeds`,
    seeds on demand end with the first look.

    Raises:
        ConfigError: The definition does not fit the base.
        DatasetError: The rows do not fit the definition.
    """
    pinned = pin(experiment, context.settings, context.reporter, context.store.registry)
    pinned = _with_rendering(context, pinned)
    sweep_arms = arms_so_far(context, pinned, more_seeds=more_seeds)
    arms = [sweep_arm.arm for sweep_arm in sweep_arms]
    sweep = _identity(pinned)
    experiment_id = context.store.experiment(pinned.spec.name, pinned.spec)
    previous = [run for run in context.store.runs(experiment_id, kind="sweep") if run.tags.get(SWEEP_TAG) == sweep]
    complete = all_done(context, sweep_arms) and bool(previous) and previous[-1].status == "FINISHED"
    for advice in () if complete else rung_advice(pinned.spec.sweep.early_stopping, arms):
        context.reporter.warn(advice)
    return PreparedSweep(
        experiment=pinned,
        sweep_arms=sweep_arms,
        sweep=sweep,
        experiment_id=experiment_id,
        parent_run_id=previous[-1].run_id if previous else None,
        previous_plan=previous[-1].tags.get(ANSWER_PLAN, "") if previous else "",
        earlier_plans=json.loads(previous[-1].tags.get(EARLIER_PLANS, "[]")) if previous else [],
        more_seeds=more_seeds,
        complete=complete,
        reports=_check(context, arms, rows, bases) if preflight and not complete else {},
    )


def _with_rendering(context: Context, experiment: Experiment) -> Experiment:
    """Settle the version of rendering: an earlier one if the queue has arms of this definition with that version only.

    Arms with the new one would be trained anew, and could not be compared with those that are there.
    """
    if experiment.spec.dataset.rendering is not None:
        return experiment
    newer = experiment.with_pins(rendering=RENDERING)
    used = experiment.spec.dataset.reading()
    if used or context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in newer.arms]):
        return newer
    earlier = experiment.with_pins(rendering=1)
    known = context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in earlier.arms])
    if not known:
        return newer
    context.reporter.warn(
        f"{len(known):,} arms of {experiment.spec.name} were submitted with a release that guessed the types of cells "
        "(dataset.rendering: 1), and this submission keeps to that; to train them anew with the cells as they are "
        "written, pass --set dataset.rendering=2"
    )
    return earlier


def submit(
    context: Context,
    prepared: PreparedSweep,
    *,
    command: str,
    priority: int = 0,
    after: Sequence[int] = (),
) -> SubmittedSweep:
    """Queue the missing jobs of a prepared sweep; `command` runs it again, for its note.

    Raises:
        JobError: A job of `after`, which must succeed first, does not exist.
    """
    spec = prepared.experiment.spec
    for job_id in after:
        context.queue.get(job_id)
    _announce(context, prepared)
    parent_run_id = prepared.parent_run_id or _create_parent(context, prepared, command)
    _store_reports(context, prepared, parent_run_id)
    first = ArmWork(
        arm=prepared.arms[0],
        experiment=spec.name,
        experiment_id=prepared.experiment_id,
        parent_run_id=parent_run_id,
        run_name="",
        register_as=None if spec.register is None else spec.register.name,
        log_examples=spec.tracking.log_examples,
        definition=prepared.experiment.text,
        command=command,
    )
    jobs = queue_arms(context, first, prepared.sweep_arms, priority=priority, after=after)
    known = {sweep_arm.arm.spec_hash for sweep_arm in prepared.sweep_arms}
    while prepared.experiment.adds_seeds and all(job.ended for job in jobs):
        # Other sweeps had trained all arms of a stage, and no job of this one would end and lead to the next stage.
        sweep_arms = arms_so_far(context, prepared.experiment, more_seeds=prepared.more_seeds)
        if known.issuperset(sweep_arm.arm.spec_hash for sweep_arm in sweep_arms):
            break
        context.reporter.say(next_seeds_message(context, prepared.experiment, more_seeds=prepared.more_seeds))
        known |= {sweep_arm.arm.spec_hash for sweep_arm in sweep_arms}
        add_members(context, parent_run_id, [sweep_arm.arm for sweep_arm in sweep_arms])
        jobs = queue_arms(context, first, sweep_arms, priority=priority, after=after)
    return SubmittedSweep(experiment=spec.name, parent_run_id=parent_run_id, jobs=tuple(jobs))


def _identity(experiment: Experiment) -> str:
    """ID of a sweep: its arms, their evaluations and the ranking metric; for a search, its first arms."""
    spec, arms = experiment.spec, experiment.arms
    hashes = [*(arm.spec_hash for arm in arms), *(arm.eval_hash() for arm in arms)]
    if (primary := spec.evaluation.primary_metric) != DEFAULT_PRIMARY_METRIC:
        hashes.append(primary)
    named = sorted([*hashes, *{arm.base_eval_hash() for arm in arms}])
    return (
        digest({"search": spec.sweep.model_dump(mode="json"), "first": named})
        if experiment.is_search
        else digest(named)
    )


def _check(
    context: Context, arms: Sequence[ArmSpec], rows: RowsCache, bases: BaseHolder | None
) -> dict[str, tuple[Report, str]]:
    """Check names, then run the preflight of every distinct table; each raises with all of its errors."""
    reports: dict[str, tuple[Report, str]] = {}
    checked: set[int] = set()
    tokenizers: dict[str, tuple[Any, int]] = {}
    sourced_arms = [(arm, find_sources(arm, context.settings, context.reporter)) for arm in arms]
    check_names(context, sourced_arms)
    for arm, sources in sourced_arms:
        if bases is not None:
            base = bases.get(sources.base, arm.quantization, arm.attn_implementation, arm.towers)
            tokenizer, vocab_size = base.tokenizer, embedding_rows(base.model)
        else:
            path = str(sources.base.path)
            tokenizer, vocab_size = tokenizers.setdefault(path, _tokenizer(sources))
        table = rows.get(arm, sources, tokenizer)
        if id(table) in checked:
            continue
        checked.add(id(table))
        name = "data" if not reports else f"data-{len(reports) + 1}"
        reports[name] = check_rows(context.reporter, arm, vocab_size, table, show=not reports)
    return reports


def _tokenizer(sources: ArmSources) -> tuple[Any, int]:
    tokenizer = load_tokenizer(sources.base.path)
    config = read_json(sources.base.path / "config.json")
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return tokenizer, int(size) if size is not None else len(tokenizer)


def _create_parent(context: Context, prepared: PreparedSweep, command: str) -> str:
    provenance = collect()
    spec = prepared.experiment.spec
    run = context.store.start_run(
        prepared.experiment_id,
        f"sweep of {sum(prepared.experiment.planned_rounds) or len(prepared.sweep_arms)} arms",
        tags={
            **provenance.tags(),
            SWEEP_TAG: prepared.sweep,
            PRIMARY_METRIC: spec.evaluation.primary_metric,
            **_plan_tags(prepared),
        },
        description=sweep_note(spec, prepared.arms, command=command),
        kind="sweep",
        status="SCHEDULED",
    )
    run.text(prepared.experiment.text, DEFINITION)
    run.json(provenance.to_dict(), "provenance.json")
    if provenance.git.diff:
        run.text(provenance.git.diff, "uncommitted.diff")
    run.leave()
    return run.run_id


def make_current(context: Context, prepared: PreparedSweep) -> None:
    """Make a complete sweep the one that `compare` shows, as a submission does."""
    assert prepared.parent_run_id is not None, "what is complete has a run"
    _resume_current(context, prepared, prepared.parent_run_id).leave()


def add_members(context: Context, parent_run_id: str, arms: Sequence[ArmSpec]) -> None:
    """Record all arms of a sweep in its run, also those that other sweeps have trained."""
    run = context.store.resume_run(parent_run_id, system_metrics=False, restart=False)
    run.tags(member_tags([arm.spec_hash for arm in arms]))
    run.leave()


def next_seeds_message(context: Context, experiment: Experiment, *, more_seeds: bool) -> str:
    """What the next stage of seeds on demand trains, why, and what it costs."""
    plan, stages = answer_plan(experiment), stages_so_far(context, experiment, more_seeds=more_seeds)
    assert plan is not None
    assert stages, "an experiment with seeds on demand"
    trained = context.queue.find(JobKind.TRAIN, [arm.spec_hash for stage in stages for _, arm in stage.arms])
    counts = [int((job.result or {}).get("steps", 0)) for job in trained.values()]
    steps = max(counts, default=0) or stages[-1].arms[0][1].training.max_steps
    return f"{experiment.spec.name}: {describe_stage(plan, stages[-1], steps, MAX_ARMS)}"


def _resume_current(context: Context, prepared: PreparedSweep, parent_run_id: str) -> Run:
    run = context.store.resume_run(parent_run_id, system_metrics=False, restart=False)
    # `compare` shows the sweep that was submitted last.
    bases = sorted({arm.base_eval_hash() for arm in prepared.arms})
    tags = sweep_tags([arm.spec_hash for arm in prepared.arms])
    run.tags({**tags, BASE_EVALUATIONS: ",".join(bases), **_plan_tags(prepared)})
    if prepared.parent_run_id is not None:
        run.text(prepared.experiment.text, DEFINITION)
    return run


def _plan_tags(prepared: PreparedSweep) -> dict[str, str]:
    """The plan of the answer; of a sweep that was submitted before, also the plans that this one replaces."""
    plan = answer_plan(prepared.experiment)
    new = "" if plan is None else json.dumps(plan.to_json())
    old = prepared.previous_plan
    tags = {ANSWER_PLAN: new}
    if prepared.experiment.adds_seeds:
        tags[MORE_SEEDS] = json.dumps(prepared.more_seeds)
    if prepared.parent_run_id is None or old == new:
        return tags
    earlier = [*prepared.earlier_plans, json.loads(old) if old else None]
    return {**tags, EARLIER_PLANS: json.dumps(earlier[-_MOST_EARLIER:])}


_MOST_EARLIER = 10  # an MLflow tag holds 8,000 characters


def _announce(context: Context, prepared: PreparedSweep) -> None:
    """Say before training how many seeds an answer takes, or that there will be none and what to add."""
    experiment = prepared.experiment
    plan = answer_plan(experiment)
    if len({arm.lora.r for arm in experiment.arms}) < 2 and not experiment.is_search:
        if plan is not None:
            context.reporter.warn("one rank, so there will be no statement about ranks: give lora.r several values")
        return
    if plan is not None and not plan.fixed:
        context.reporter.say(_plan_of_seeds(prepared, plan))
        return
    one_seed = len({arm.seed for arm in experiment.arms}) == 1
    if plan is None:
        why = "one seed each" if one_seed else "no margin is set"
        context.reporter.warn(
            f"{why}, so there will be no statement about ranks: add `answer: {{margin: {PROPOSED_MARGIN}}}` to the "
            "definition"
        )
    elif len(plan.seeds) < 2:
        context.reporter.warn(
            "one seed each, so there will be no statement about ranks: give sweep.parameters.seed at least two values"
        )


def _plan_of_seeds(prepared: PreparedSweep, plan: AnswerPlan) -> str:
    """How many seeds there are at each stage, and what those to come cost."""
    spec = prepared.experiment.spec
    rows = [report.counts["train.rows"] for report, _ in prepared.reports.values()]
    arm = max(prepared.arms, key=lambda arm: arm.training.max_steps or 0)
    steps = arm.optimizer_steps(max(rows)) if rows else arm.training.max_steps
    count = len(prepared.arms)
    pilots = "1 pilot seed that chooses" if len(plan.pilot) == 1 else f"{len(plan.pilot)} pilot seeds that choose"
    parts = [f"{pilots} {', '.join(plan.tune)}"] if plan.pilot else []
    parts.append(f"{len(plan.looks[0])} seeds of each rank")
    if len(plan.looks) > 1 and prepared.more_seeds:
        parts.append(f"up to {len(plan.seeds)} if one is undecided (--no-more-seeds: never)")
    return f"{spec.name}: {', '.join(parts)}; now {count} arms{seed_cost(count, steps, MAX_ARMS)}"


def _store_reports(context: Context, prepared: PreparedSweep, parent_run_id: str) -> None:
    run = _resume_current(context, prepared, parent_run_id)
    for name, (report, preview) in prepared.reports.items():
        run.json(asdict(report), f"{name}/preflight.json")
        if prepared.experiment.spec.tracking.log_examples:
            run.text(preview, f"{name}/preview.html")
    run.leave()
