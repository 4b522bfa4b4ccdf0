"""From a definition to jobs in the queue: pins, checks, runs that show what is planned, and the jobs themselves.

Submitting the same definition again adds nothing; what was cut off in the middle is completed.

- What another experiment has done already: runs of its own here, pointing there, in place of doing it again.
- Arms into the queue: training, evaluation after it, the bare base, and the runs that show what is planned.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rankwise.assets.layout import read_json
from rankwise.data.preflight import Report
from rankwise.evaluation.gather import BASE_EVALUATIONS, DEFAULT_PRIMARY_METRIC, EVAL_HASH, LINKED, PRIMARY_METRIC
from rankwise.evaluation.metrics import MetricValue, to_tracking
from rankwise.exceptions import JobError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment
from rankwise.experiment.rules import rung_advice
from rankwise.experiment.schema import digest
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.modeling.adapter import embedding_rows
from rankwise.modeling.base import load_tokenizer
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.context import Context, Work
from rankwise.tasks.rows import RowsCache, Sources, check_names, check_rows, find_sources, pin
from rankwise.tasks.search import SweepArm, arms_so_far, is_pruned
from rankwise.tracking.notes import arm_note, base_note, sweep_note
from rankwise.tracking.provenance import collect
from rankwise.tracking.query import RunRecord, get_run, search_runs, sweep_tags
from rankwise.tracking.registry import JOB
from rankwise.tracking.run import SPEC_HASH, Run


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


_AHEAD = 16
"""As many as a worker claims together."""


def queue_arms(
    context: Context, any_work: Work, arms: Sequence[SweepArm], *, priority: int = 0, after: Sequence[int] = ()
) -> list[Job]:
    """Queue what is missing of some arms of a sweep: training, evaluation after it, and the bare base.

    What was decided about an arm stays decided: one that was pruned in this sweep, and one from which a later round was
    proposed, is not tried again.

    Args:
        context: The stores.
        any_work: The work of any arm of the sweep: what its rows have in common.
        arms: The arms.
        priority: The higher one is claimed first.
        after: Jobs that must have succeeded first.

    Returns:
        All jobs of these arms, as they now stand.
    """
    works = [
        replace(
            any_work,
            arm=each.arm,
            bare=False,
            run_name=each.label or f"arm {each.arm.short}",
            stops=each.stops,
            group=each.group,
        )
        for each in arms
    ]
    known = context.queue.find(JobKind.TRAIN, [each.arm.spec_hash for each in arms])
    left = {each.arm.spec_hash for each in arms if _is_decided(each, known.get(each.arm.spec_hash))}
    open_works = [work for work in works if work.arm.spec_hash not in left]
    submitted = context.queue.submit(
        [work.train_job(priority=priority, after=tuple(after)) for work in open_works], again=True
    )
    trains = {**known, **{job.spec_hash: job for job in submitted}}
    _schedule(context, any_work.experiment_id, [(work, trains[work.arm.spec_hash]) for work in open_works])
    bare = {
        each.arm.base_eval_hash(): replace(
            any_work, arm=each.arm, bare=True, run_name="base alone", stops=(), group=None
        )
        for each in arms
    }
    evaluate = [work.evaluate_job(tuple(after), priority=priority) for work in bare.values()]
    evaluate += [work.evaluate_job(after=(trains[work.arm.spec_hash].id,), priority=priority) for work in open_works]
    evaluations = context.queue.submit(evaluate, again=True)
    ended = context.queue.find(JobKind.EVALUATE, [work.arm.eval_hash() for work in works if work.arm.spec_hash in left])
    evaluations += ended.values()
    pairs = [(work, trains[work.arm.spec_hash]) for work in works]
    link_done(context, pairs, evaluations)
    ids = [*(train.id for _, train in pairs), *(evaluation.id for evaluation in evaluations)]
    # Once more: since then the runs have been noted, and a worker may have begun.
    stand = {job.id: job for job in context.queue.jobs(ids=ids)}
    return [stand[each] for each in ids]


def all_done(context: Context, arms: Sequence[SweepArm]) -> bool:
    """Whether nothing of these arms is left to do."""
    trains = context.queue.find(JobKind.TRAIN, [each.arm.spec_hash for each in arms])
    hashes = [*(each.arm.eval_hash() for each in arms), *{each.arm.base_eval_hash() for each in arms}]
    evaluations = context.queue.find(JobKind.EVALUATE, hashes)
    ended = {
        each.arm.eval_hash()
        for each in arms
        if (train := trains.get(each.arm.spec_hash)) is not None and _is_pruned_here(each, train)
    }
    ended |= {value for value, job in evaluations.items() if job.state is JobState.SUCCEEDED}
    return ended.issuperset(hashes)


def _is_decided(each: SweepArm, train: Job | None) -> bool:
    return train is not None and (each.settled or _is_pruned_here(each, train))


def _is_pruned_here(each: SweepArm, train: Job) -> bool:
    """Whether early stopping has ended the arm in this sweep; what another sweep has pruned is trained here."""
    return each.group is not None and is_pruned(train, each.group)


def _schedule(context: Context, experiment_id: str, pairs: Sequence[tuple[Work, Job]]) -> None:
    """Make the runs of the arms that are claimed first, so that a server that is away then keeps nobody waiting.

    A run takes MLflow a good part of a second: the others are made when their arm is claimed. `compare` has those from
    the queue.
    """
    queued = [(work, job) for work, job in pairs if job.state is JobState.QUEUED]
    waiting = [(work, job) for work, job in queued if job.mlflow_run_id is None]
    waiting = waiting[: max(0, _AHEAD - (len(queued) - len(waiting)))]
    if not waiting:
        return
    provenance = collect().tags()
    scheduled = context.store.find_scheduled(experiment_id)
    for work, job in waiting:
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
            run.end("KILLED", "a worker has begun this arm in a run of its own", timeout=0.0)


logger = logging.getLogger(__name__)
SWEEP = "rankwise.sweep"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An experiment that is ready for the queue.

    Attributes:
        experiment: With every pin.
        sweep_arms: Its arms; of a search those that are known so far.
        sweep: Names the set of arms and evaluations: the tag `rankwise.sweep` of the sweep's run.
        experiment_id: Of MLflow.
        parent_run_id: The run of an earlier submission of the same sweep.
        complete: Whether all of it is done, reported too.
        reports: Preflight and preview by the name of the rows.
    """

    experiment: Experiment
    sweep_arms: Sequence[SweepArm]
    sweep: str
    experiment_id: str
    parent_run_id: str | None
    complete: bool
    reports: dict[str, tuple[Report, str]]

    @property
    def arms(self) -> list[ArmSpec]:
        """The arms."""
        return [each.arm for each in self.sweep_arms]


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What a submission has come to.

    Attributes:
        experiment: Name of the definition.
        parent_run_id: The run of the sweep.
        jobs: All jobs of the sweep, as they now stand.
    """

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
) -> Prepared:
    """Resolve pins, and check the rows before anything is queued.

    Args:
        context: The stores.
        experiment: The experiment; missing pins are resolved and recorded.
        rows: Makes rows into tokens, and keeps them.
        preflight: Whether to check rows.
        bases: Loads the base, for a process that trains next; otherwise only its tokenizer is read.

    Raises:
        ConfigError: The definition does not fit the base.
        DatasetError: The rows do not fit the definition.
        AssetError: Base or rows cannot be had.
        TrackingError: The tracking server does not answer.
    """
    pinned = pin(experiment, context.settings, context.voice, context.store.registry)
    sweep_arms = arms_so_far(context, pinned)
    arms = [each.arm for each in sweep_arms]
    sweep = _identity(pinned)
    experiment_id = context.store.experiment(pinned.spec.name, pinned.spec)
    before = [run for run in context.store.runs(experiment_id, kind="sweep") if run.tags.get(SWEEP) == sweep]
    complete = all_done(context, sweep_arms) and bool(before) and before[-1].status == "FINISHED"
    for advice in () if complete else rung_advice(pinned.spec.sweep.early_stopping, arms):
        context.voice.warn(advice)
    return Prepared(
        experiment=pinned,
        sweep_arms=sweep_arms,
        sweep=sweep,
        experiment_id=experiment_id,
        parent_run_id=before[-1].run_id if before else None,
        complete=complete,
        reports=_check(context, arms, rows, bases) if preflight and not complete else {},
    )


def submit(
    context: Context,
    prepared: Prepared,
    *,
    command: str,
    priority: int = 0,
    after: Sequence[int] = (),
) -> Submitted:
    """Queue what is missing: training, evaluation after it, and the bare base.

    Args:
        context: The stores.
        prepared: From `prepare`.
        command: How to run it again, for the note of the sweep.
        priority: The higher one is claimed first.
        after: Jobs that must have succeeded first.

    Raises:
        JobError: A job of `after` does not exist.
        TrackingError: The tracking server does not answer.
    """
    spec = prepared.experiment.spec
    for job_id in after:
        context.queue.get(job_id)
    parent_run_id = prepared.parent_run_id or _create_parent(context, prepared, command)
    _store_reports(context, prepared, parent_run_id)
    first = Work(
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
    return Submitted(experiment=spec.name, parent_run_id=parent_run_id, jobs=tuple(jobs))


def _identity(experiment: Experiment) -> str:
    """Names a sweep by its arms, their evaluations and what ranks them.

    A search, whose arms follow from results, is named by its first ones.
    """
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
    """Names, then the preflight of every distinct table. Raises `ConfigError` with all errors of either."""
    reports: dict[str, tuple[Report, str]] = {}
    seen: set[int] = set()
    tokenizers: dict[str, tuple[Any, int]] = {}
    found = [(arm, find_sources(arm, context.settings, context.voice)) for arm in arms]
    check_names(context, found)
    for arm, sources in found:
        if bases is not None:
            base = bases.get(sources.base, arm.quantization)
            tokenizer, vocab_size = base.tokenizer, embedding_rows(base.model)
        else:
            path = str(sources.base.path)
            tokenizer, vocab_size = tokenizers.setdefault(path, _tokenizer(sources))
        table = rows.get(arm, sources, tokenizer)
        if id(table) in seen:
            continue
        seen.add(id(table))
        name = "data" if not reports else f"data-{len(reports) + 1}"
        reports[name] = check_rows(context.voice, arm, vocab_size, table, show=not reports)
    return reports


def _tokenizer(sources: Sources) -> tuple[Any, int]:
    """A base's tokenizer, and the tokens that it has rows for as its configuration says."""
    tokenizer = load_tokenizer(sources.base.path)
    config = read_json(sources.base.path / "config.json")
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    return tokenizer, int(size) if size is not None else len(tokenizer)


def _create_parent(context: Context, prepared: Prepared, command: str) -> str:
    provenance = collect()
    spec = prepared.experiment.spec
    run = context.store.start_run(
        prepared.experiment_id,
        f"sweep of {sum(prepared.experiment.planned_rounds) or len(prepared.sweep_arms)} arms",
        tags={**provenance.tags(), SWEEP: prepared.sweep, PRIMARY_METRIC: spec.evaluation.primary_metric},
        description=sweep_note(spec, prepared.arms, command=command),
        kind="sweep",
        status="SCHEDULED",
    )
    run.text(prepared.experiment.text, "experiment.yaml")
    run.json(provenance.to_dict(), "provenance.json")
    if provenance.git.diff:
        run.text(provenance.git.diff, "uncommitted.diff")
    run.leave()
    return run.run_id


def make_current(context: Context, prepared: Prepared) -> None:
    """Make a sweep that is complete the one that `compare` shows, as a submission does."""
    assert prepared.parent_run_id is not None, "what is complete has a run"
    _resume_current(context, prepared, prepared.parent_run_id).leave()


def _resume_current(context: Context, prepared: Prepared, parent_run_id: str) -> Run:
    run = context.store.resume_run(parent_run_id, system_metrics=False, restart=False)
    # The sweep that was submitted last is the one that `compare` shows.
    bases = sorted({arm.base_eval_hash() for arm in prepared.arms})
    run.tags({**sweep_tags([arm.spec_hash for arm in prepared.arms]), BASE_EVALUATIONS: ",".join(bases)})
    return run


def _store_reports(context: Context, prepared: Prepared, parent_run_id: str) -> None:
    run = _resume_current(context, prepared, parent_run_id)
    for name, (report, preview) in prepared.reports.items():
        run.json(asdict(report), f"{name}/preflight.json")
        if prepared.experiment.spec.tracking.log_examples:
            run.text(preview, f"{name}/preview.html")
    run.leave()
