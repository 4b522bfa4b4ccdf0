"""Life cycle of a sweep: begin, the next rounds of a search, comparison and report, the alias, the end of its run."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from rankwise import __version__
from rankwise.evaluation.compare import SECONDARY, ArmRecord, Comparison, compare, format_value, title
from rankwise.evaluation.findings import Findings, findings
from rankwise.evaluation.gather import gather, typed_params
from rankwise.exceptions import ConfigError
from rankwise.experiment.answer_plan import all_seeds
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.search import SEARCHES
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.jobs.store import JobStore, every_job
from rankwise.report.comparison_output import comparison_json
from rankwise.report.figure import rank_figure
from rankwise.report.history import History
from rankwise.report.page import report_page
from rankwise.report.tables import model_route, run_route
from rankwise.tasks.adaptive_sweep import arms_so_far, end_pruned_runs, history, publish_history
from rankwise.tasks.answer_seeds import last_submission
from rankwise.tasks.context import ArmWork, Context
from rankwise.tasks.submit import add_members, next_seeds_message, queue_arms
from rankwise.tracking.cleanup import open_sweeps
from rankwise.tracking.notes import arm_note, sweep_note, table
from rankwise.tracking.query import current_sweep, membership
from rankwise.tracking.run import Run
from rankwise.tracking.store import Store

# Status of jobs without a run. Succeeded jobs always have one; submission reuses that of another experiment.
_STATUS: Mapping[JobState, str] = {
    JobState.QUEUED: "SCHEDULED",
    JobState.RUNNING: "RUNNING",
    JobState.UPLOADING: "RUNNING",
    JobState.FAILED: "FAILED",
    JobState.CANCELLED: "KILLED",
}


def with_queued_arms(store: Store, queue: JobStore, comparison: Comparison, *, everything: bool = False) -> Comparison:
    """Add arms whose run has not started, with the state of their job in MLflow's terms.

    `everything`: the comparison covers the arms of all sweeps.
    """
    known = {arm.spec_hash: arm for arm in comparison.arms}
    begun = {spec_hash for spec_hash, arm in known.items() if arm.status != "SCHEDULED"}
    train_jobs = every_job(queue, kinds=[JobKind.TRAIN], experiment=comparison.experiment, states=list(_STATUS))
    jobs = [job for job in train_jobs if job.spec_hash not in begun]
    if jobs and not everything and comparison.experiment_id is not None:
        sweep = current_sweep(store.runs(comparison.experiment_id, kind="sweep"))
        if sweep is not None:
            belongs = membership(sweep)
            jobs = [job for job in jobs if belongs(job.spec.get("parent_run_id"), job.spec_hash)]
    if not jobs:
        return comparison
    waiting = {job.spec_hash: _record(job, known.get(job.spec_hash)) for job in jobs}
    sorted_arms = compare(
        comparison.experiment,
        list({**known, **waiting}.values()),
        primary_metric=comparison.primary_metric,
        greater_is_better=comparison.greater_is_better,
    ).arms
    return replace(comparison, arms=sorted_arms)


def _record(job: Job, planned: ArmRecord | None) -> ArmRecord:
    if planned is not None:
        return replace(planned, status=_STATUS[job.state], reason=job.error)
    params = ArmWork.of(job).arm.params
    return ArmRecord(
        spec_hash=job.spec_hash,
        run_id=job.mlflow_run_id or "",
        status=_STATUS[job.state],
        reason=job.error,
        params=typed_params({key: str(value) for key, value in params.items() if value is not None}),
        metrics={},
    )


REPORT = "report.html"
"""Artifact of the sweep's run."""

_MOST_ROWS = 25  # an MLflow note holds 8,000 characters


def publish_report(
    context: Context, experiment: Experiment, arms: Sequence[ArmSpec], parent: Run, command: str
) -> Comparison:
    """Compare the arms of this sweep, store comparison and report, and set the alias on the best version."""
    spec = experiment.spec
    # The experiment's current sweep may be another one, with a different primary metric and base.
    known = gather(context.store, spec.name, everything=True, parent_run_id=parent.run_id)
    everything = with_queued_arms(context.store, context.queue, known, everything=True)
    hashes = {arm.spec_hash for arm in arms}
    comparison = replace(everything, arms=tuple(arm for arm in everything.arms if arm.spec_hash in hashes))
    finding = findings(context.store, comparison)
    parent.json(comparison_json(comparison, finding), "comparison.json")
    parent.text(report_page(context.store, comparison, finding, command=command, version=__version__), REPORT)
    parent.figure(rank_figure(comparison), "plots/quality-by-rank.png")
    parent.describe(sweep_note(spec, arms, command=command, results=_results(comparison, finding)))
    answer = finding.answer
    parent.tags(
        {
            "rankwise.answer_status": answer.status,
            "rankwise.answer_rank": "" if answer.rank is None else f"{answer.rank:g}",
            "rankwise.answer_text": answer.text,
        }
    )
    best = comparison.best
    if best is not None:
        _set_alias(context, spec, best, {arm.spec_hash: arm for arm in arms}[best.spec_hash])
    return comparison


def _set_alias(context: Context, spec: ExperimentSpec, best: ArmRecord, arm: ArmSpec) -> None:
    if spec.register is None or best.model_uri is None:
        return
    resolved = context.store.registry.resolve(best.model_uri)
    if resolved.version is None:
        return
    name, version = resolved.version.name, resolved.version.version
    values = {key: metric.value for key, metric in best.metrics.items() if metric.value is not None}
    context.store.registry.describe_version(name, version, arm_note(arm, model_uri=best.model_uri, metrics=values))
    if spec.register.alias is not None:
        context.store.registry.set_alias(name, spec.register.alias, version)
        context.reporter.done(f"models:/{name}@{spec.register.alias} is version {version} (r = {arm.lora.r})")


def _results(comparison: Comparison, finding: Findings) -> str:
    """The comparison as Markdown, best configuration first. Links are relative to MLflow's UI."""
    keys = [key for key in comparison.keys if key not in SECONDARY]
    header = ["r", *(title(key) for key in keys), "run", "model"]
    finished = [arm for configuration in comparison.ranking for arm in configuration.finished]
    rows = []
    for arm in finished[:_MOST_ROWS]:
        cells = [" ± ".join(filter(None, format_value(key, *_value(arm, key)))) for key in keys]
        run = f"[{arm.run_id[:8]}](#/{run_route(comparison, arm)})"
        model = f"[{arm.model_uri}](#/{model_route(comparison, arm)})" if arm.model_uri else ""
        rows.append([str(arm.params.get("lora.r", "")), *cells, run, model])
    base_cells = [
        " ± ".join(filter(None, format_value(key, comparison.base[key].value, comparison.base[key].stderr)))
        if key in comparison.base
        else ""
        for key in keys
    ]
    hint = f" {finding.answer.hint}" if finding.answer.hint else ""
    text = f"**{finding.answer.text}**{hint} The artifact `{REPORT}` has limits, plots and curves.\n\n"
    text += table(header, [*rows, ["base alone", *base_cells, "", ""]])
    if len(finished) > _MOST_ROWS:
        text += f"\n\n... and {len(finished) - _MOST_ROWS:,} more."
    pruned = sum(arm.pruned for arm in comparison.arms)
    if pruned:
        arms = "arm was" if pruned == 1 else "arms were"
        text += f"\n\n{pruned} {arms} stopped early; their runs say at which step and why."
    return text


def _value(arm: ArmRecord, key: str) -> tuple[float | None, float | None]:
    metric = arm.metrics.get(key)
    return (None, None) if metric is None else (metric.value, metric.stderr)


logger = logging.getLogger(__name__)
_UNFINISHED = (JobState.QUEUED, JobState.RUNNING, JobState.UPLOADING)


def begin_sweep(context: Context, parent_run_id: str) -> None:
    """Mark a sweep as running. Works without the server."""
    run = context.store.resume_run(parent_run_id, system_metrics=False)
    run.tags({"rankwise.reason": ""})
    run.leave(timeout=0.0)


def finish_sweep(
    context: Context,
    experiment: Experiment,
    arms: Sequence[ArmSpec],
    parent_run_id: str,
    *,
    failed: int,
    command: str,
) -> Comparison:
    """Compare the arms, store the comparison in the sweep's run, set the alias, and end the run. Repeatable."""
    end_pruned_runs(context, context.queue.find(JobKind.TRAIN, [arm.spec_hash for arm in arms]).values())
    parent = context.store.resume_run(parent_run_id, system_metrics=False, repeats=False, restart=False)
    try:
        comparison = publish_report(context, experiment, arms, parent, command)
        if experiment.spec.sweep.method in SEARCHES:
            publish_history(context, experiment, parent)
    except BaseException:
        parent.leave(timeout=0.0)
        raise
    parent.end("FAILED" if failed else "FINISHED", f"{failed} jobs failed" if failed else None)
    return comparison


def end_sweep(context: Context, parent_run_id: str, *, killed: bool, reason: str) -> None:
    """End the run of an interrupted sweep."""
    parent = context.store.resume_run(parent_run_id, system_metrics=False, restart=False)
    parent.end("KILLED" if killed else "FAILED", reason, timeout=10)


def finish_sweeps_of(context: Context, jobs: Collection[Job]) -> list[str]:
    """Finish the sweeps of these jobs that have no unfinished job; returns their run IDs."""
    finished = []
    sweeps = {work.parent_run_id: work for work in (ArmWork.of(job) for job in jobs if "parent_run_id" in job.spec)}
    for parent_run_id, work in sweeps.items():
        if any(_of_sweep(context.queue, work.experiment, parent_run_id, _UNFINISHED)):
            continue
        own = jobs_of_sweep(context.queue, work.experiment, parent_run_id)
        experiment = context.experiment_of(work)
        failed = sum(job.state is JobState.FAILED for job in own)
        arms = arms_of_sweep(context, experiment, own)
        finish_sweep(context, experiment, arms, parent_run_id, failed=failed, command=work.command)
        context.reporter.done(
            f"{work.experiment}: all jobs of the sweep have ended; rankwise compare {work.experiment}"
        )
        finished.append(parent_run_id)
    return finished


def finish_open_sweeps(context: Context, *, watched: str | None = None) -> tuple[str, ...]:
    """Finish sweeps whose run is open although all of their jobs have ended, for example after a crash.

    Skips `watched`, the run of a sweep that another process will finish.
    """
    finished = []
    for run_id, experiment in open_sweeps(context.store.client).items():
        if run_id == watched or context.store.is_open(run_id):
            continue
        own = list(islice(_of_sweep(context.queue, experiment, run_id), 1))
        try:
            submit_next_rounds(context, own)
            finished += finish_sweeps_of(context, own)
        except ConfigError as error:  # Its definition is no longer valid; still finish the others.
            context.reporter.warn(f"the sweep of {experiment} cannot be finished: {error}")
    return tuple(finished)


def arms_of_sweep(context: Context, experiment: Experiment, jobs: Collection[Job]) -> list[ArmSpec]:
    """The arms of a sweep: those of its definition, those proposed by a search, and seeds on demand.

    Other sweeps may have trained some of these.
    """
    arms = {arm.spec_hash: arm for arm in experiment.arms}
    seeds = {arm.spec_hash: arm for arm in all_seeds(experiment)}
    arms |= {spec_hash: seeds[spec_hash] for spec_hash in context.queue.find(JobKind.TRAIN, list(seeds))}
    for job in jobs:
        if job.kind is JobKind.TRAIN:
            arm = ArmWork.of(job).arm
            arms.setdefault(arm.spec_hash, arm)
    return list(arms.values())


def jobs_of_sweep(
    queue: JobStore, experiment: str, parent_run_id: str, states: Collection[JobState] | None = None
) -> list[Job]:
    """Jobs submitted for a sweep, including later rounds of a search; in all states by default."""
    return list(_of_sweep(queue, experiment, parent_run_id, states))


def _of_sweep(
    queue: JobStore, experiment: str, parent_run_id: str, states: Collection[JobState] | None = None
) -> Iterator[Job]:
    jobs = every_job(queue, experiment=experiment, states=states)
    return (job for job in jobs if job.spec.get("parent_run_id") == parent_run_id)


def submit_next_rounds(context: Context, jobs: Collection[Job]) -> list[Job]:
    """Queue what follows in the sweeps of these jobs: the next round of a search, or seeds on demand.

    Returns all jobs of these sweeps.

    Raises:
        TrackingError: Seeds on demand depend on results that cannot be read.
    """
    jobs_of_sweeps: list[Job] = []
    for work, priority in _sweeps(jobs):
        experiment, more_seeds = context.experiment_of(work), True
        if not experiment.is_search:
            # Until then nothing follows, and the tracking server may be unavailable.
            if any(_of_sweep(context.queue, work.experiment, work.parent_run_id, _UNFINISHED)):
                continue
            last = last_submission(context, work)
            if last is None:
                continue
            experiment, more_seeds = last.experiment, last.more_seeds
            spec = experiment.spec
            name = None if spec.register is None else spec.register.name
            text, examples = experiment.text, spec.tracking.log_examples
            work = replace(work, definition=text, register_as=name, log_examples=examples)
        jobs_of_sweeps += _submit_missing(context, work, experiment, priority=priority, more_seeds=more_seeds)
    return jobs_of_sweeps


def _submit_missing(
    context: Context, work: ArmWork, experiment: Experiment, *, priority: int, more_seeds: bool
) -> list[Job]:
    """Queue the arms of the next round or stage that have no jobs; returns the jobs of all rounds."""
    arms = arms_so_far(context, experiment, more_seeds=more_seeds)
    trains = context.queue.find(JobKind.TRAIN, [sweep_arm.arm.spec_hash for sweep_arm in arms])
    evaluations = context.queue.find(JobKind.EVALUATE, [sweep_arm.arm.eval_hash() for sweep_arm in arms])
    new_arms = [
        sweep_arm
        for sweep_arm in arms
        # An arm without its evaluation was submitted by a process that died in between.
        if not sweep_arm.settled
        and (sweep_arm.arm.spec_hash not in trains or sweep_arm.arm.eval_hash() not in evaluations)
    ]
    submitted: list[Job] = []
    if new_arms:
        if experiment.is_search:
            message = _round_message(history(context, experiment), len(experiment.planned_rounds), len(new_arms))
        else:
            message = next_seeds_message(context, experiment, more_seeds=more_seeds)
        context.reporter.say(message)
        add_members(context, work.parent_run_id, [sweep_arm.arm for sweep_arm in arms])
        submitted = queue_arms(context, work, new_arms, priority=priority)
    return [*submitted, *trains.values(), *evaluations.values()]


def _round_message(record: History, rounds: int, new: int) -> str:
    number = record.trials[-1].round
    ended = sum(trial.round < number for trial in record.trials)
    text = f"{record.experiment}: round {number + 1} of {rounds}: {new} arms, proposed from {ended} that have ended"
    best = record.best_so_far[-1]
    if best is None:
        return text
    trial = next(trial for trial in record.trials if trial.state == "complete" and trial.value == best)
    return f"{text}; best so far {record.primary_metric} {best:.4g} with {trial.label}"


def _sweeps(jobs: Collection[Job]) -> list[tuple[ArmWork, int]]:
    sweeps: dict[str, tuple[ArmWork, int]] = {}
    for job in jobs:
        if "parent_run_id" in job.spec and job.spec["parent_run_id"] not in sweeps:
            sweeps[job.spec["parent_run_id"]] = ArmWork.of(job), job.priority
    return list(sweeps.values())
