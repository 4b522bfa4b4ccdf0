"""Run a whole definition in this process: check, submit, work until nothing is left, compare, set the alias."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from rankwise.data.preflight import Report
from rankwise.evaluation.gather import PRIMARY_METRIC
from rankwise.exceptions import RankwiseError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.hashing import digest
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.sweep import labelled_arms
from rankwise.jobs.job import Job, JobKind, JobState, Outcome
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.check import check_rows
from rankwise.tasks.context import Context
from rankwise.tasks.evaluate import evaluate_claimed
from rankwise.tasks.heartbeat import LEASE_S
from rankwise.tasks.link import link_done
from rankwise.tasks.outcomes import outcome_of
from rankwise.tasks.payload import Work
from rankwise.tasks.prepare import find_sources, pin
from rankwise.tasks.report import publish_report
from rankwise.tasks.rows import RowsCache
from rankwise.tasks.train import INTERRUPTED, train_claimed
from rankwise.tracking.descriptions import sweep_note
from rankwise.tracking.provenance import collect
from rankwise.tracking.runs import Run

logger = logging.getLogger(__name__)
SWEEP = "rankwise.sweep"
# Adapters evaluated together over one base; more would only wait for the slowest.
_EVALUATED_TOGETHER = 16
_POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class SweepEnd:
    """How a sweep ended.

    Attributes:
        experiment: Name of the definition.
        parent_run_id: The run of the sweep.
        failed: Jobs that have failed for good.
        interrupted: Whether it was asked to stop before all was done.
        worked: Whether anything was trained or evaluated now.
    """

    experiment: str
    parent_run_id: str
    failed: tuple[Job, ...]
    interrupted: bool
    worked: bool


def run_experiment(context: Context, spec: ExperimentSpec, *, max_arms: int, command: str) -> SweepEnd:
    """Do all that a definition asks for and that has not been done yet.

    Args:
        context: The stores.
        spec: The definition; missing pins are resolved and recorded.
        max_arms: The largest pack; 1 trains one arm after another.
        command: How to run it again, for the note of the sweep.

    Raises:
        ConfigError: The definition does not fit the base.
        DatasetError: The rows do not fit the definition.
        AssetError: Base or rows cannot be had.
    """
    for problem in context.store.sync().problems:
        context.voice.warn(f"an earlier run left something that cannot be delivered: {problem}")
    pinned = pin(spec, context.settings, context.voice, context.store.registry)
    labelled = labelled_arms(pinned)
    arms = [arm for _, arm in labelled]
    train_hashes, eval_hashes = [arm.spec_hash for arm in arms], [arm.eval_hash() for arm in arms]
    hashes = [*eval_hashes, *{arm.base_eval_hash() for arm in arms}]
    done = context.queue.find(JobKind.EVALUATE, hashes)
    bases, rows = BaseHolder(context.settings, context.voice), RowsCache(context.settings, context.voice)
    sweep = digest(sorted([*train_hashes, *hashes]))
    experiment_id = context.store.experiment(pinned.name, pinned)
    before = [run for run in context.store.runs(experiment_id, kind="sweep") if run.tags.get(SWEEP) == sweep]
    complete = all(value in done and done[value].state is JobState.SUCCEEDED for value in hashes)
    if complete and before and before[-1].status == "FINISHED":
        context.voice.say(f"nothing to do: all {len(arms)} arms are trained and evaluated")
        return SweepEnd(
            experiment=pinned.name, parent_run_id=before[-1].run_id, failed=(), interrupted=False, worked=False
        )
    reports = _check(context, arms, bases, rows)
    parent = _open_parent(context, pinned, arms, experiment_id, sweep, before[-1].run_id if before else None, command)
    for name, (report, preview) in reports.items():
        parent.json(asdict(report), f"{name}/preflight.json")
        if spec.tracking.log_examples:
            parent.text(preview, f"{name}/preview.html")
    jobs = _submit(context, pinned, labelled, experiment_id, parent.run_id)
    try:
        _work(context, jobs, bases, rows, max_arms)
        ended = [context.queue.get(job.id) for job in jobs]
        failed = tuple(job for job in ended if job.state is JobState.FAILED)
        if not context.stop.is_set():
            publish_report(context, pinned, arms, parent, command)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        parent.end("KILLED" if interrupted else "FAILED", INTERRUPTED if interrupted else str(error), timeout=10)
        raise
    if context.stop.is_set():
        parent.end("KILLED", INTERRUPTED)
    else:
        parent.end("FAILED" if failed else "FINISHED", f"{len(failed)} jobs failed" if failed else None)
    return SweepEnd(
        experiment=pinned.name,
        parent_run_id=parent.run_id,
        failed=failed,
        interrupted=context.stop.is_set(),
        worked=True,
    )


def _check(
    context: Context, arms: Sequence[ArmSpec], bases: BaseHolder, rows: RowsCache
) -> dict[str, tuple[Report, str]]:
    """Preflight of every distinct table, before anything is trained. Raises `DatasetError` with all of its errors."""
    reports: dict[str, tuple[Report, str]] = {}
    seen: set[int] = set()
    for arm in arms:
        sources = find_sources(arm, context.settings, context.voice)
        base = bases.get(sources.base, arm.quantization)
        table = rows.get(arm, sources, base.tokenizer)
        if id(table) in seen:
            continue
        seen.add(id(table))
        name = "data" if not reports else f"data-{len(reports) + 1}"
        reports[name] = check_rows(context.voice, arm, base, table, show=not reports)
    return reports


def _open_parent(
    context: Context,
    spec: ExperimentSpec,
    arms: Sequence[ArmSpec],
    experiment_id: str,
    sweep: str,
    existing: str | None,
    command: str,
) -> Run:
    if existing is not None:
        run = context.store.resume_run(existing)
        run.tags({"rankwise.reason": ""})
        return run
    provenance = collect()
    run = context.store.start_run(
        experiment_id,
        f"sweep of {len(arms)} arms",
        tags={**provenance.tags(), SWEEP: sweep, PRIMARY_METRIC: spec.evaluation.primary_metric},
        description=sweep_note(spec, arms, command=command),
        kind="sweep",
    )
    run.text(spec.to_yaml(), "experiment.yaml")
    run.json(provenance.to_dict(), "provenance.json")
    if provenance.git.diff:
        run.text(provenance.git.diff, "uncommitted.diff")
    return run


def _submit(
    context: Context,
    spec: ExperimentSpec,
    labelled: Sequence[tuple[str, ArmSpec]],
    experiment_id: str,
    parent_run_id: str,
) -> list[Job]:
    """Submit what is missing: training, evaluation after it, and the bare base."""
    definition = spec.to_yaml()

    def work(arm: ArmSpec, name: str, bare: bool = False) -> Work:
        return Work(
            arm=arm,
            bare=bare,
            experiment=spec.name,
            experiment_id=experiment_id,
            parent_run_id=parent_run_id,
            run_name=name,
            register_as=None if spec.register is None else spec.register.name,
            log_examples=spec.tracking.log_examples,
            definition=definition,
        )

    works = [work(arm, label or f"arm {arm.short}") for label, arm in labelled]
    trains = context.queue.submit([each.train_job() for each in works], again=True)
    after = [each.evaluate_job(after=(train.id,)) for each, train in zip(works, trains, strict=True)]
    bare = {arm.base_eval_hash(): work(arm, "base alone", bare=True).evaluate_job() for _, arm in labelled}
    evaluations = context.queue.submit([*bare.values(), *after], again=True)
    link_done(context, list(zip(works, trains, strict=True)), evaluations)
    return [*trains, *evaluations]


def _work(context: Context, jobs: Sequence[Job], bases: BaseHolder, rows: RowsCache, max_arms: int) -> None:
    """Claim and do these jobs until all have ended or the process is asked to stop. Training comes first."""
    ids = [job.id for job in jobs]
    kinds: list[tuple[JobKind, int, Callable[..., None]]] = [
        (JobKind.TRAIN, max_arms, train_claimed),
        (JobKind.EVALUATE, _EVALUATED_TOGETHER, evaluate_claimed),
    ]
    waiting_said = False
    while not context.stop.is_set():
        context.queue.reclaim(host=context.worker.host, alive=psutil.pids())
        for kind, most, execute in kinds:
            claimed = context.queue.claim(context.worker, lease=LEASE_S, max_arms=most, kinds=[kind], among=ids)
            if claimed:
                _execute(context, execute, claimed, bases, rows)
                break
        else:
            left = [job for job in map(context.queue.get, ids) if not job.ended]
            if not left or all(_hopeless(context, job) for job in left):
                return
            if not waiting_said:
                context.voice.say(f"waiting: {len(left)} jobs are held by another worker or wait for another try")
                waiting_said = True
            context.stop.wait(_POLL_S)


def _hopeless(context: Context, job: Job) -> bool:
    """Whether a queued job waits for one that has failed."""
    if job.state is not JobState.QUEUED or job.kind is not JobKind.EVALUATE or job.spec["bare"]:
        return False
    spec_hash = Work.of(job).arm.spec_hash
    train = context.queue.find(JobKind.TRAIN, [spec_hash]).get(spec_hash)
    return train is not None and train.state in {JobState.FAILED, JobState.CANCELLED}


def _execute(context: Context, execute: Callable[..., None], claimed: list[Job], *arguments: Any) -> None:
    """Do one claim; an error has been noted in its jobs, and the others go on, unless it will meet them too.

    Raises:
        RankwiseError: The environment is at fault: a full disk, a store that does not answer.
    """
    try:
        execute(context, claimed, *arguments)
    except RankwiseError as error:
        if outcome_of(error) is Outcome.PREEMPTED:
            raise
        context.voice.fail(str(error))
    except Exception:
        # A bug keeps its traceback; it is not the other arms' fault.
        context.voice.fail(traceback.format_exc())
