"""From a definition to jobs in the queue: pins, checks, runs that show what is planned, and the jobs themselves.

Submitting the same definition again adds nothing; what was cut off in the middle is completed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.assets.layout import read_json
from rankwise.data.preflight import Report
from rankwise.evaluation.gather import BASE_EVALUATIONS, DEFAULT_PRIMARY_METRIC, PRIMARY_METRIC
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.hashing import digest
from rankwise.experiment.schema import ExperimentSpec
from rankwise.experiment.sweep import expand, is_search, planned_rounds
from rankwise.experiment.sweep_rules import rung_advice
from rankwise.jobs.job import Job
from rankwise.modeling.base import load_tokenizer
from rankwise.modeling.embeddings import embedding_rows
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.check import check_names, check_rows
from rankwise.tasks.context import Context
from rankwise.tasks.enqueue import all_done, queue_arms
from rankwise.tasks.payload import Work
from rankwise.tasks.prepare import Sources, find_sources, pin
from rankwise.tasks.rows import RowsCache
from rankwise.tasks.search import SweepArm, arms_so_far
from rankwise.tracking.descriptions import sweep_note
from rankwise.tracking.provenance import collect
from rankwise.tracking.runs import Run
from rankwise.tracking.sweeps import sweep_tags

logger = logging.getLogger(__name__)
SWEEP = "rankwise.sweep"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A definition that is ready for the queue.

    Attributes:
        spec: With every pin.
        sweep_arms: Its arms; of a search those that are known so far.
        sweep: Names the set of arms and evaluations: the tag `rankwise.sweep` of the sweep's run.
        experiment_id: Of MLflow.
        parent_run_id: The run of an earlier submission of the same sweep.
        complete: Whether all of it is done, reported too.
        reports: Preflight and preview by the name of the rows.
    """

    spec: ExperimentSpec
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
    spec: ExperimentSpec,
    rows: RowsCache,
    *,
    preflight: bool = True,
    bases: BaseHolder | None = None,
) -> Prepared:
    """Resolve pins, and check the rows before anything is queued.

    Args:
        context: The stores.
        spec: The definition; missing pins are resolved and recorded.
        rows: Makes rows into tokens, and keeps them.
        preflight: Whether to check rows.
        bases: Loads the base, for a process that trains next; otherwise only its tokenizer is read.

    Raises:
        ConfigError: The definition does not fit the base.
        DatasetError: The rows do not fit the definition.
        AssetError: Base or rows cannot be had.
        TrackingError: The tracking server does not answer.
    """
    pinned = pin(spec, context.settings, context.voice, context.store.registry)
    sweep_arms = arms_so_far(context, pinned)
    arms = [each.arm for each in sweep_arms]
    sweep = _identity(pinned)
    experiment_id = context.store.experiment(pinned.name, pinned)
    before = [run for run in context.store.runs(experiment_id, kind="sweep") if run.tags.get(SWEEP) == sweep]
    complete = all_done(context, sweep_arms) and bool(before) and before[-1].status == "FINISHED"
    for advice in () if complete else rung_advice(pinned.sweep.early_stopping, arms):
        context.voice.warn(advice)
    return Prepared(
        spec=pinned,
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
    spec = prepared.spec
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
        definition=spec.to_yaml(),
        command=command,
    )
    jobs = queue_arms(context, first, prepared.sweep_arms, priority=priority, after=after)
    return Submitted(experiment=spec.name, parent_run_id=parent_run_id, jobs=tuple(jobs))


def _identity(spec: ExperimentSpec) -> str:
    """Names a sweep by its arms, their evaluations and what ranks them.

    A search, whose arms follow from results, is named by its first ones.
    """
    arms = expand(spec)
    hashes = [*(arm.spec_hash for arm in arms), *(arm.eval_hash() for arm in arms)]
    if (primary := spec.evaluation.primary_metric) != DEFAULT_PRIMARY_METRIC:
        hashes.append(primary)
    named = sorted([*hashes, *{arm.base_eval_hash() for arm in arms}])
    return digest({"search": spec.sweep.model_dump(mode="json"), "first": named}) if is_search(spec) else digest(named)


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
    spec = prepared.spec
    run = context.store.start_run(
        prepared.experiment_id,
        f"sweep of {sum(planned_rounds(spec)) or len(prepared.sweep_arms)} arms",
        tags={**provenance.tags(), SWEEP: prepared.sweep, PRIMARY_METRIC: spec.evaluation.primary_metric},
        description=sweep_note(spec, prepared.arms, command=command),
        kind="sweep",
        status="SCHEDULED",
    )
    run.text(spec.to_yaml(), "experiment.yaml")
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
        if prepared.spec.tracking.log_examples:
            run.text(preview, f"{name}/preview.html")
    run.leave()
