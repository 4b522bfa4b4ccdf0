"""Commands that a worker's child process accepts from its parent, by their protocol names."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console

from rankwise.evaluation.findings import findings
from rankwise.evaluation.gather import gather
from rankwise.experiment.experiment import Experiment, parse_experiment
from rankwise.jobs.job import Job, JobKind, JobState
from rankwise.report.comparison_output import comparison_json, comparison_view
from rankwise.tasks.adaptive_sweep import settle_rungs
from rankwise.tasks.arm_run import open_run
from rankwise.tasks.context import failure_of
from rankwise.tasks.evaluate import evaluate_claimed
from rankwise.tasks.evaluation_setup import recorded_definition
from rankwise.tasks.predict import predict_claimed, settle_predictions
from rankwise.tasks.publish import publish_again
from rankwise.tasks.session import Session, jobs_of
from rankwise.tasks.submit import make_current, prepare, submit
from rankwise.tasks.sweep_lifecycle import (
    arms_of_sweep,
    begin_sweep,
    end_sweep,
    finish_open_sweeps,
    finish_sweep,
    finish_sweeps_of,
    submit_next_rounds,
    with_queued_arms,
)
from rankwise.tasks.train import load_claimed, train_claimed
from rankwise.tracking.provenance import collect
from rankwise.training.checkpoint import remove_composition
from rankwise.worker.protocol import Message

Value = dict[str, Any] | None

KINDS: Mapping[str, Callable[[Session, list[Job]], None]] = {
    JobKind.TRAIN: train_claimed,
    JobKind.EVALUATE: evaluate_claimed,
    JobKind.PREDICT: predict_claimed,
}
"""One function per kind of job. It reports how each job ended, or raises."""


def _work(session: Session, command: Message) -> Value:
    jobs = jobs_of(command)
    with session.logged(jobs):
        for parent_run_id in {job.spec["parent_run_id"] for job in jobs if "parent_run_id" in job.spec}:
            session.begin(parent_run_id, begin_sweep)
        KINDS[command["do"]](session, jobs)
    return None


def _publish(session: Session, command: Message) -> Value:
    stored = {job.id: job.result for job in session.context.queue.jobs(ids=[row["id"] for row in command["jobs"]])}
    jobs = [replace(job, result=stored.get(job.id)) for job in jobs_of(command)]
    runs = {}
    with session.logged(jobs):
        try:
            base, arms = load_claimed(session, jobs)
            provenance = collect()
            for arm in arms:
                with arm.logged():
                    runs[arm.job.id] = open_run(session, arm, base, provenance)
            publish_again(session, base, arms, runs)
        except BaseException as error:
            for run in runs.values():
                run.end("FAILED", failure_of(error).text, timeout=10)
            raise
    return None


def _settle(session: Session, command: Message) -> Value:
    """Follow up on jobs that ended or paused: delete files, decide rungs, submit rounds, finish sweeps."""
    jobs = session.context.queue.jobs(ids=command["jobs"])
    done = {job.id for job in jobs if job.state is JobState.SUCCEEDED}
    for composition in list(session.compositions):
        composition.open -= done
        if not composition.open:
            remove_composition(session.settings.checkpoints, composition.spec_hashes)
            session.compositions.remove(composition)
    settle_predictions(session.context, jobs)
    settle_rungs(session.context, jobs)
    submitted = [job.id for job in submit_next_rounds(session.context, jobs)]
    if command["complete"]:
        watched = command["watched"]
        finish_sweeps_of(session.context, [job for job in jobs if job.spec.get("parent_run_id") != watched])
        if command["open"]:
            finish_open_sweeps(session.context, watched=watched)
    return {"submitted": submitted}


def _submit(session: Session, command: Message) -> Value:
    context = session.context
    session.phase("load")
    for problem in context.store.sync().problems:
        context.reporter.warn(f"an earlier run left records that cannot be delivered to MLflow: {problem}")
    if command["source"] is not None:
        text = recorded_definition(context, command["source"])
        experiment = parse_experiment(text, command["source"], command["overrides"], recorded=True)
    else:
        experiment = Experiment.from_json(command["experiment"])
    prepared = prepare(
        context, experiment, session.rows, bases=session.bases, more_seeds=command.get("more_seeds", True)
    )
    context.experiments.add(prepared.experiment)
    if prepared.complete:
        make_current(context, prepared)
        session.reporter.say(f"nothing to do: all {len(prepared.sweep_arms)} arms are trained and evaluated")
        return {"experiment": prepared.experiment.spec.name, "parent_run_id": None, "jobs": []}
    submitted = submit(context, prepared, command=command["command"])
    session.begin(submitted.parent_run_id, begin_sweep)
    return {
        "experiment": submitted.experiment,
        "parent_run_id": submitted.parent_run_id,
        "definition": prepared.experiment.text,
        "jobs": [job.id for job in submitted.jobs],
    }


def _finish(session: Session, command: Message) -> Value:
    session.phase("report")
    context = session.context
    jobs = context.queue.jobs(ids=command["jobs"])
    experiment = context.experiments.get(command["definition"], f"the definition of {command['experiment']}")
    failed = [job for job in jobs if job.state is JobState.FAILED]
    finish_sweep(
        context,
        experiment,
        arms_of_sweep(context, experiment, jobs),
        command["parent_run_id"],
        failed=len(failed),
        command=command["command"],
    )
    return None


def _end(session: Session, command: Message) -> Value:
    end_sweep(session.context, command["parent_run_id"], killed=command["killed"], reason=command["reason"])
    return None


def _compare(session: Session, command: Message) -> Value:
    session.phase("report")
    context = session.context
    comparison = with_queued_arms(context.store, context.queue, gather(context.store, command["experiment"]))
    finding = findings(context.store, comparison)
    text = io.StringIO()
    console = Console(file=text, width=command["width"], force_terminal=command["terminal"], highlight=False)
    console.print(comparison_view(comparison, console, finding))
    return {"json": comparison_json(comparison, finding), "text": text.getvalue()}


COMMANDS: Mapping[str, Callable[[Session, Message], Value]] = {
    **{str(kind): _work for kind in KINDS},
    "publish": _publish,
    "settle": _settle,
    "submit": _submit,
    "finish": _finish,
    "end": _end,
    "compare": _compare,
}
