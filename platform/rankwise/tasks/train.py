"""Training of a claimed pack: load base and rows, select the arms that fit into memory, train, publish each arm."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rankwise.flavor as flavor
from rankwise.experiment.arm import ArmSpec
from rankwise.jobs.job import Job, Outcome
from rankwise.logs import bound
from rankwise.modeling.base import LoadedBase
from rankwise.tasks.arm_rows import ArmSources, find_sources
from rankwise.tasks.arm_run import ClaimedArm, Curves, open_run
from rankwise.tasks.context import ArmWork, failure_of
from rankwise.tasks.gc import adapter_directory
from rankwise.tasks.publish import finish_arm, leave_arm, stored_outcome
from rankwise.tasks.session import Composition, Session, token_of
from rankwise.tracking.provenance import collect
from rankwise.tracking.run import Run
from rankwise.training.arm import ArmOutcome, ArmTask
from rankwise.training.budget import plan_pack
from rankwise.training.loop import train_pack

logger = logging.getLogger(__name__)
INTERRUPTED = "interrupted"
_ENDING_S = 10.0
_MOST_NAMES = 4


def train_claimed(session: Session, jobs: Sequence[Job]) -> None:
    """Train the jobs of one claim together and report how each ended.

    A problem of one arm (non-finite loss, lost claim) ends only that arm. An error of the whole pack is raised; arms
    that ended before it are already reported.
    """
    runs: dict[str, Run] = {}
    try:
        base, arms = load_claimed(session, jobs)
        outcomes = _finished_before(session, base, arms)
        tasks = [_task(session, arm) for arm in arms if arm.spec_hash not in outcomes]
        arms = _return_what_does_not_fit(session, base, arms, tasks)
        provenance = collect()
        for arm in arms:
            with arm.logged():
                runs[arm.spec_hash] = open_run(session, arm, base, provenance)
        pack = [arm for arm in arms if arm.spec_hash not in outcomes]
        if pack:
            outcomes |= _train(session, base, pack, tasks, runs)
        for arm in arms:
            if arm.spec_hash in runs:
                with arm.logged():
                    finish_arm(session, base, arm, runs[arm.spec_hash], outcomes[arm.spec_hash])
                del runs[arm.spec_hash]
    except BaseException as error:
        failure = failure_of(error)
        for run in runs.values():
            if failure.type == "KeyboardInterrupt":
                run.end("KILLED", INTERRUPTED, timeout=_ENDING_S)
            else:
                run.end("FAILED", failure.text, timeout=_ENDING_S)
        raise


def load_claimed(session: Session, jobs: Sequence[Job]) -> tuple[LoadedBase, list[ClaimedArm]]:
    """Load the base of a pack, and its arms with their rows."""
    session.phase("load")
    works = [ArmWork.of(job) for job in jobs]
    assert len({work.arm.pack_key for work in works}) == 1, "they share one base, which is loaded once"
    sources = [find_sources(work.arm, session.settings, session.reporter) for work in works]
    base = session.bases.get(
        sources[0].base, works[0].arm.quantization, works[0].arm.attn_implementation, works[0].arm.towers
    )
    session.phase("tokenize")
    arms = [_claimed(session, base, *claimed) for claimed in zip(jobs, works, sources, strict=True)]
    return base, arms


def _claimed(session: Session, base: LoadedBase, job: Job, work: ArmWork, sources: ArmSources) -> ClaimedArm:
    with bound(arm=work.arm.short):
        return ClaimedArm(job=job, work=work, rows=session.rows.get(work.arm, sources, base.tokenizer))


def _finished_before(session: Session, base: LoadedBase, arms: Sequence[ClaimedArm]) -> dict[str, ArmOutcome]:
    """Arms that an earlier attempt finished but did not publish."""
    outcomes = {arm.spec_hash: stored_outcome(session, base, arm) for arm in arms}
    return {spec_hash: outcome for spec_hash, outcome in outcomes.items() if outcome is not None}


def _task(session: Session, arm: ClaimedArm) -> ArmTask:
    return ArmTask(
        spec=arm.work.arm,
        train=arm.rows.train,
        evaluation=arm.rows.eval if len(arm.rows.eval) else None,
        sources={example.id: example.source for example in arm.rows.examples.eval if example.source},
        init_adapter=_initial_adapter(session, arm.work.arm),
        stop_at=arm.work.stop_after(arm.done_steps),
    )


def _initial_adapter(session: Session, arm: ArmSpec) -> Path | None:
    if arm.init_from is None:
        return None
    target = session.settings.cache / "adapters" / adapter_directory(arm.init_from)
    return flavor.download_adapter(arm.init_from, target)


def _return_what_does_not_fit(
    session: Session, base: LoadedBase, arms: Sequence[ClaimedArm], tasks: list[ArmTask]
) -> list[ClaimedArm]:
    if not tasks:
        return list(arms)
    plan = plan_pack(base, tasks)
    session.reporter.say(plan.estimate.text())
    excluded = {task.spec.spec_hash for task in plan.left}
    tasks[:] = plan.fits
    for arm in arms:
        if arm.spec_hash in excluded:
            session.report(arm.job, Outcome.RETURNED)
    if excluded:
        session.reporter.say(f"{len(excluded)} arms do not fit into memory with the others and return to the queue")
    return [arm for arm in arms if arm.spec_hash not in excluded]


def pack_label(names: Sequence[str]) -> str:
    """Label of a pack for its progress bar: the arms' names, or their number if there are many."""
    return "; ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} arms"


def _train(
    session: Session,
    base: LoadedBase,
    arms: Sequence[ClaimedArm],
    tasks: Sequence[ArmTask],
    runs: dict[str, Run],
) -> dict[str, ArmOutcome]:
    by_hash = {arm.spec_hash: arm for arm in arms}
    jobs = {arm.spec_hash: arm.job for arm in arms}
    session.compositions.append(Composition(spec_hashes=tuple(jobs), open={job.id for job in jobs.values()}))
    steps = max(arm.work.arm.optimizer_steps(len(arm.rows.train)) for arm in arms)
    names = pack_label([arm.work.run_name for arm in arms])

    def should_leave(spec_hash: str) -> bool:
        token = token_of(jobs[spec_hash])
        return not session.claims.holds(token) or session.claims.cancelled(token)

    def report_progress(spec_hash: str, values: Mapping[str, Any], always: bool) -> None:
        session.progress(token_of(jobs[spec_hash]), values, always=always)

    def on_arm_end(outcome: ArmOutcome) -> None:
        # A cancelled or taken-over arm does not wait for the others to finish.
        if should_leave(outcome.spec_hash):
            leave_arm(session, by_hash[outcome.spec_hash], runs.pop(outcome.spec_hash))

    session.phase("train")
    with bound(step=0), session.reporter.task_with_remark(f"training {names}", steps, "steps") as (advance, note):
        targets = {arm.spec_hash: (runs[arm.spec_hash], arm.work.arm) for arm in arms}
        curves = Curves(targets, advance, note, report_progress, on_arm_end)
        return train_pack(
            base,
            tasks,
            directory=session.settings.checkpoints,
            observer=curves,
            should_stop=session.stop.is_set,
            should_leave=should_leave,
        )
