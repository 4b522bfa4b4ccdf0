"""Evaluation of stored adapters and bare bases: for evaluate jobs, the `evaluate` command and a promotion's comparison.

`Evaluator` loads a base and its rows once, attaches adapters, and evaluates them and the bare base on the same rows in
shared batches. The command and the gate first group models by base; a claimed pack is one group already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rankwise.flavor as flavor
from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.data.rows import Example
from rankwise.data.template import apply_template
from rankwise.evaluation.evaluate import MAX_ROWS, Evaluation, evaluate, prediction_rows
from rankwise.evaluation.gather import EVAL_HASH
from rankwise.evaluation.metrics import to_tracking
from rankwise.exceptions import ConfigError, JobError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import EvaluationSpec, QuantizationSpec
from rankwise.flavor.base import describe_quantization, find_base, recorded_attention
from rankwise.flavor.fetch import Fetched, fetch
from rankwise.flavor.metadata import AdapterMetadata, BaseFacts, template_digest
from rankwise.jobs.job import Job, JobKind, Outcome
from rankwise.modeling.adapter import load_adapter
from rankwise.modeling.base import LoadedBase, base_attention, load_tokenizer, quiet_transformers
from rankwise.modeling.decoding.scheduler import greedy
from rankwise.modeling.fingerprint import fingerprint_base
from rankwise.modeling.lora.lean import keep_dequantized
from rankwise.modeling.lora.packed import delete_adapter
from rankwise.reporter import Reporter
from rankwise.tasks.arm_rows import ArmRows, RowsCache, find_sources
from rankwise.tasks.base_holder import BaseHolder
from rankwise.tasks.context import ArmWork, Context
from rankwise.tasks.evaluation_setup import EvaluationSetup, recorded_setup
from rankwise.tasks.session import Session, StoppableReporter, token_of
from rankwise.tasks.submit import run_of_arm
from rankwise.tracking.notes import base_note
from rankwise.tracking.provenance import collect
from rankwise.tracking.registry import link_metrics
from rankwise.tracking.run import Run
from rankwise.tracking.values import DatasetRecord

BARE = "base"
"""Name of the setup's bare base among the models; other bases are named `base of URI`."""
_NO_TEMPLATE = "none"
_TEMPLATE = ("chat_template", "chat_template_revision", "chat_template_kwargs")


def evaluate_attached(
    base: LoadedBase, rows: ArmRows, adapters: Sequence[str | None], spec: EvaluationSpec, progress: Reporter
) -> dict[str | None, Evaluation]:
    """Evaluate adapters that are attached to the base, and the bare base (None), on the evaluation rows.

    Raises:
        ConfigError: A metric is not known, or a prompt does not fit.
    """
    examples, encoded = rows.evaluated
    batch = min(MAX_ROWS, spec.per_device_eval_batch_size * len(set(adapters)))
    answers = greedy(base, max_new_tokens=spec.max_new_tokens, batch_size=batch, progress=progress)
    with keep_dequantized(base.model):
        return evaluate(base, adapters, examples, encoded, spec, generate=answers, progress=progress)


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """A base, for messages and comparison; digests of its content and tokenizer, and its quantization in words."""

    source: str
    revision: str
    fingerprint: str
    tokenizer: str
    quantization: str

    @classmethod
    def of(cls, base: LoadedBase) -> BaseIdentity:
        """Describe a loaded base."""
        return cls(
            source=base.source,
            revision=base.revision,
            fingerprint=base.fingerprint.digest,
            tokenizer=base.fingerprint.tokenizer,
            quantization=describe_quantization(base.quantization),
        )

    def __str__(self) -> str:
        """One line."""
        return f"{self.source} ({self.quantization}, fingerprint {self.fingerprint})"


@dataclass(frozen=True, kw_only=True)
class BaseGroup:
    """Models over one base (`bare` is its own name) whose rows are rendered the same way.

    `other`: the base is quantized differently than when the adapters were trained. `towers`: it has the towers of a
    multimodal wrapper.
    """

    experiment: str
    base: ResolvedBase
    arm: ArmSpec
    bare: str
    other: bool = False
    towers: bool = False
    models: list[str] = field(default_factory=list)


def is_plain_directory(uri: str) -> bool:
    """Whether a name is a PEFT directory, which does not reliably identify its base."""
    return Path(uri).is_dir() and not (Path(uri) / "MLmodel").exists()


def group_by_base(
    context: Context,
    setting: EvaluationSetup,
    uris: Sequence[str],
    quantization: QuantizationSpec | None,
    metadata: Mapping[str, AdapterMetadata],
) -> list[BaseGroup]:
    """Group models by base, attention and chat template. The first group is over the setup's own base.

    That group exists even without adapters. PEFT directories are assumed to belong to the setup's base; `quantization`
    replaces the recorded ones.

    Raises:
        BaseMismatchError: The base at hand is not the recorded one.
    """
    arm = setting.arm
    recorded = {uri: located.base for uri, located in metadata.items()}
    resolved = _own_base(context, arm, recorded)
    chosen = quantization or arm.quantization
    own = BaseGroup(
        experiment=setting.spec.name,
        base=resolved,
        arm=arm.model_copy(update={"quantization": chosen}),
        bare=BARE,
        other=describe_quantization(chosen) != describe_quantization(arm.quantization),
        towers=arm.towers,
    )
    fingerprint = fingerprint_base(resolved.path, context.settings)
    own_attention = base_attention(resolved, chosen, arm.attn_implementation).name
    own_base = (fingerprint.digest, describe_quantization(arm.quantization), own_attention, arm.towers)
    own_template = _template_of(arm, resolved) if metadata else _NO_TEMPLATE
    groups = {(*own_base, own_template): own}
    for uri in uris:
        if (facts := recorded.get(uri)) is None:
            own.models.append(uri)
            continue
        template = _template_key(metadata[uri].chat_template, metadata[uri].reading.chat_template_kwargs)
        located = resolved if facts.fingerprint == fingerprint else find_base(facts, uri, context.settings)
        used = quantization or facts.quantization
        attention = base_attention(located, used, recorded_attention(facts, located, used)).name
        base = (facts.fingerprint.digest, describe_quantization(facts.quantization), attention, facts.towers)
        if base == own_base and template != own_template and _recorded_template(context, uri) is None:
            template = own_template  # No template is recorded for the adapter; the setup's definition decides.
        key = (*base, template)
        if key not in groups:
            groups[key] = BaseGroup(
                experiment=setting.spec.name,
                base=located,
                arm=_over(context, arm, uri, located, used, attention),
                bare=f"{BARE} of {uri}",
                other=describe_quantization(used) != describe_quantization(facts.quantization),
                towers=facts.towers,
            )
        groups[key].models.append(uri)
    for group in groups.values():
        group.models.append(group.bare)
    return list(groups.values())


def _template_of(arm: ArmSpec, base: ResolvedBase) -> str:
    dataset = arm.dataset
    with quiet_transformers():
        tokenizer = load_tokenizer(base.path)
    digest = template_digest(apply_template(tokenizer, dataset.chat_template, dataset.chat_template_revision))
    return _template_key(digest, dataset.chat_template_kwargs)


def _template_key(digest: str, arguments: Mapping[str, Any]) -> str:
    """What a template renders with: its digest, and its arguments, if any."""
    return f"{digest} {json.dumps(dict(arguments), sort_keys=True)}" if arguments else digest


def _own_base(context: Context, arm: ArmSpec, recorded: Mapping[str, BaseFacts]) -> ResolvedBase:
    """The setup's base; at another path (`RANKWISE_BASES`) if an adapter over it records its content."""
    for uri, facts in recorded.items():
        if (facts.source, facts.revision) == (arm.base_model, arm.base_model_revision):
            return find_base(facts, uri, context.settings)
    return resolve_base(arm.base_model, arm.base_model_revision, context.settings, context.reporter)


def _over(
    context: Context, arm: ArmSpec, uri: str, base: ResolvedBase, quantization: QuantizationSpec, attention: str
) -> ArmSpec:
    # A model that rankwise did not train gets the base's own template.
    template = _recorded_template(context, uri) or {**dict.fromkeys(_TEMPLATE), "chat_template_kwargs": {}}
    return arm.model_copy(
        update={
            "base_model": base.source,
            "base_model_revision": base.revision,
            "quantization": quantization,
            "attn_implementation": attention,
            "dataset": arm.dataset.model_copy(update=template),
        }
    )


def _recorded_template(context: Context, uri: str) -> dict[str, Any] | None:
    if uri.startswith(("models:", "runs:")):
        with suppress(ConfigError):
            dataset = recorded_setup(context, uri).arm.dataset
            return {name: getattr(dataset, name) for name in _TEMPLATE}
    return None


@dataclass(frozen=True, kw_only=True)
class ModelEvaluation:
    """One model's evaluation; `uri` is None for a bare base or a directory, `bare` names the bare base of its group."""

    evaluation: Evaluation
    uri: str | None
    base: BaseIdentity
    bare: str
    rows: ArmRows


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Evaluations by given name, bare bases last; `excluded` counts rows that the caller excluded."""

    setting: EvaluationSetup
    models: dict[str, ModelEvaluation]
    excluded: int = 0

    @property
    def results(self) -> dict[str, Evaluation]:
        """Evaluations by name."""
        return {name: model.evaluation for name, model in self.models.items()}

    @property
    def bases(self) -> tuple[BaseIdentity, ...]:
        """The distinct bases."""
        return tuple(dict.fromkeys(model.base for model in self.models.values()))


class Evaluator:
    """Evaluates models; keeps base and rows between calls."""

    def __init__(self, context: Context, bases: BaseHolder | None = None, rows: RowsCache | None = None) -> None:
        """Take the base and rows that the process already holds, or start empty."""
        self._context = context
        self._bases = bases or BaseHolder(context.settings, context.reporter)
        self._rows = rows or RowsCache(context.settings, context.reporter)

    def training_rows(self, setting: EvaluationSetup) -> Sequence[Example]:
        """The training rows of a setup's arm.

        Raises:
            DatasetError: The rows do not fit the definition.
        """
        sources = find_sources(setting.arm, self._context.settings, self._context.reporter)
        arm = setting.arm
        base = self._bases.get(sources.base, arm.quantization, arm.attn_implementation, arm.towers)
        return self._rows.get(setting.arm, sources, base.tokenizer).examples.train

    def evaluate(
        self, group: BaseGroup, base: LoadedBase, rows: ArmRows, stored: Mapping[str, Fetched], progress: Reporter
    ) -> dict[str, tuple[Evaluation, str | None]]:
        """Attach the adapters of a group, evaluate its models in mixed batches in the given order, and detach them.

        Returns each model's evaluation and resolved URI (None for the bare base and for a directory).

        Raises:
            ConfigError: A metric is not known, or a prompt does not fit.
            BaseMismatchError: An adapter was trained over another base.
        """
        adapters: dict[str, str | None] = {group.bare: None}
        uris: dict[str, str | None] = {group.bare: None}
        with ExitStack() as stack:
            for name in group.models:
                if name in adapters:
                    continue
                adapter, uris[name] = self._attach(base, name, stored.get(name), other=group.other)
                if adapter not in adapters.values():  # An alias and its version name the same adapter.
                    stack.callback(delete_adapter, base.model, adapter)
                adapters[name] = adapter
            order = [adapters[name] for name in group.models]
            results = evaluate_attached(base, rows, order, group.arm.evaluation, progress)
        return {name: (results[adapters[name]], uris[name]) for name in group.models}

    def assess(
        self,
        setting: EvaluationSetup,
        uris: Sequence[str],
        *,
        quantization: QuantizationSpec | None = None,
        exclude: Callable[[Example], bool] | None = None,
    ) -> Assessment:
        """Evaluate models, each over its own base, and the bare bases on the same rows.

        `uris` are stored adapters or PEFT directories; `base` is always included. `quantization` replaces that of the
        bases, with a warning if the adapters were trained over another one.

        Raises:
            ConfigError: There are no rows, or a metric is not known.
            BaseMismatchError: The base at hand is not the recorded one.
        """
        names = [uri for uri in dict.fromkeys(uris) if uri != BARE]
        models: dict[str, ModelEvaluation] = {}
        excluded = 0
        with ExitStack() as stack:
            # Fetch only once: a remote store downloads the files.
            stored = {
                uri: stack.enter_context(fetch(uri, self._context.settings.tracking_uri))
                for uri in names
                if not is_plain_directory(uri)
            }
            metadata = {uri: fetched.metadata for uri, fetched in stored.items()}
            for group in group_by_base(self._context, setting, names, quantization, metadata):
                surplus, models_of_group = self._assess(group, stored, exclude)
                models |= models_of_group
                if group.bare == BARE:
                    excluded = surplus
        ordered = [*names, *(name for name in models if name not in names)]
        return Assessment(setting=setting, models={name: models[name] for name in ordered}, excluded=excluded)

    def _assess(
        self, group: BaseGroup, stored: Mapping[str, Fetched], exclude: Callable[[Example], bool] | None
    ) -> tuple[int, dict[str, ModelEvaluation]]:
        context, arm = self._context, group.arm
        sources = find_sources(arm, context.settings, context.reporter, base=group.base, training=False)
        base = self._bases.get(group.base, arm.quantization, arm.attn_implementation, group.towers)
        table = self._rows.get(arm, sources, base.tokenizer)
        examples, _ = table.evaluated
        if not examples:
            raise ConfigError(
                f"{group.experiment} has no evaluation rows: set dataset.eval in the definition, or pass --data"
            )
        excluded = {example.id for example in examples if exclude is not None and exclude(example)}
        used = table.without(excluded) if excluded else table
        results = self.evaluate(group, base, used, stored, context.reporter)
        identity = BaseIdentity.of(base)
        return len(excluded), {
            name: ModelEvaluation(evaluation=evaluation, uri=uri, base=identity, bare=group.bare, rows=table)
            for name, (evaluation, uri) in results.items()
        }

    def _attach(self, base: LoadedBase, uri: str, stored: Fetched | None, *, other: bool) -> tuple[str, str | None]:
        """Return the adapter's name in the model and its resolved URI."""
        if stored is None:
            name = f"directory-{abs(hash(Path(uri).resolve())):x}"
            load_adapter(base.model, Path(uri), name)
            return name, None
        loaded = flavor.load_model(stored, base=base, settings=self._context.settings, allow_base_mismatch=other)
        return loaded.adapter_name, loaded.origin.uri


def single_record(rows: ArmRows) -> DatasetRecord | None:
    """The record of the evaluation rows; None for several sources, since a metric can be linked to one only."""
    records = rows.evaluation_inputs
    return records[0] if len(records) == 1 else None


def record_evaluation(
    context: Context,
    run: Run,
    evaluation: Evaluation,
    rows: ArmRows,
    spec: EvaluationSpec,
    *,
    step: int = 0,
    log_examples: bool,
    tags: Mapping[str, str] | None = None,
    model_id: str | None = None,
) -> dict[str, float]:
    """Write one model's results to a run, which stays open, and to its LoggedModel; returns the metrics as written."""
    values = to_tracking(evaluation.metrics)
    run.metrics(values, step)
    if tags:
        run.tags(tags)
    run.table(prediction_rows(evaluation, list(spec.metrics), log_examples=log_examples), "predictions.json")
    run.flush()
    if model_id is not None:
        link_metrics(context.store.client, run.run_id, model_id, list(values), step, dataset=single_record(rows))
    return values


def publish_assessment(context: Context, assessment: Assessment, *, note: str = "") -> dict[str, str]:
    """Write each model's results to a run of its own, with `note` in its name; returns run IDs by model name."""
    spec = assessment.setting.spec
    experiment_id = context.store.experiment(spec.name, spec)
    runs: dict[str, str] = {}
    for name, model in assessment.models.items():
        uri, records = model.uri, model.rows.evaluation_inputs
        run = context.store.start_run(
            experiment_id,
            f"evaluation of {uri or name}{note}",
            params={
                "model": uri or name,
                "data": ", ".join(record.source for record in records),
                "base_model": model.base.source,
                "base_model_revision": model.base.revision,
                "quantization": model.base.quantization,
            },
            tags={
                **collect().tags(),
                "rankwise.model_uri": uri,
                "rankwise.base_fingerprint": model.base.fingerprint,
            },
            # Not "base": `compare` uses the last run of that kind as the base's result on the definition's own rows.
            kind="evaluate",
            system_metrics=False,
        )
        for record in records:
            run.input(record)
        record_evaluation(
            context,
            run,
            model.evaluation,
            model.rows,
            assessment.setting.arm.evaluation,
            log_examples=spec.tracking.log_examples,
            model_id=None if uri is None else context.store.registry.resolve(uri).model_id,
        )
        run.end("FINISHED")
        runs[name] = run.run_id
    return runs


@dataclass(frozen=True, kw_only=True)
class _EvaluateJob:
    """A claimed evaluate job; `trained` is the result of the arm's train job, None for the bare base."""

    job: Job
    token: str
    work: ArmWork
    trained: dict[str, Any] | None

    @property
    def model(self) -> str:
        """The evaluator's name for the model."""
        return BARE if self.trained is None else str(self.trained["model_uri"])


def evaluate_claimed(session: Session, jobs: Sequence[Job]) -> None:
    """Evaluate the jobs of one claim over one base and report how each ended.

    Adapters are loaded by registered URI with all checks of the flavor, as users load them.
    """
    context = session.context
    session.phase("load")
    subjects = [_evaluate_job(context, job, token_of(job)) for job in jobs]
    arm = subjects[0].work.arm
    sources = find_sources(arm, context.settings, context.reporter)
    base = session.bases.get(sources.base, arm.quantization, arm.attn_implementation, arm.towers)
    session.phase("tokenize")
    table = session.rows.get(arm, sources, base.tokenizer)
    session.phase("evaluate")
    with ExitStack() as stack:
        stored = _fetch(context, [subject.model for subject in subjects if subject.trained is not None], stack)
        models = [subject.model for subject in subjects]
        group = BaseGroup(experiment=subjects[0].work.experiment, base=sources.base, arm=arm, bare=BARE, models=models)
        progress = StoppableReporter(session, [subject.token for subject in subjects])
        results = Evaluator(context, session.bases, session.rows).evaluate(group, base, table, stored, progress)
    session.phase("upload")
    for subject in subjects:
        if session.claims.cancelled(subject.token):
            session.report(subject.job, Outcome.CANCELLED)
        elif session.may_publish(subject.job):
            evaluation, _ = results[subject.model]
            session.report(subject.job, Outcome.SUCCEEDED, result=_publish(session, subject, table, evaluation))
        else:
            session.report(subject.job, Outcome.PREEMPTED)


def _fetch(context: Context, uris: Sequence[str], stack: ExitStack) -> dict[str, Fetched]:
    if not uris:
        return {}
    with context.reporter.task(f"loading {len(uris)} adapters from the registry", len(uris), "adapters") as advance:
        stored = {uri: stack.enter_context(fetch(uri, context.settings.tracking_uri)) for uri in uris}
        advance(len(uris))
    return stored


def _evaluate_job(context: Context, job: Job, token: str) -> _EvaluateJob:
    work = ArmWork.of(job)
    if work.bare:
        return _EvaluateJob(job=job, token=token, work=work, trained=None)
    trained = context.queue.find(JobKind.TRAIN, [work.arm.spec_hash]).get(work.arm.spec_hash)
    if trained is None or trained.result is None:
        raise JobError(f"job {job.id} evaluates arm {work.arm.short}, which is not trained yet")
    return _EvaluateJob(job=job, token=token, work=work, trained=trained.result)


def _publish(session: Session, subject: _EvaluateJob, table: ArmRows, evaluation: Evaluation) -> dict[str, Any]:
    context, work, trained = session.context, subject.work, subject.trained
    fence = session.fence(subject.job)
    # The arm's last step, even if an earlier checkpoint was registered: MLflow shows the value of the highest step, and
    # evaluations during training use the same keys.
    step = int(trained["steps"]) if trained is not None else 0
    if trained is not None:
        run = context.store.resume_run(
            run_of_arm(context, work), system_metrics=False, repeats=False, fence=fence, restart=False
        )
    elif subject.job.mlflow_run_id is not None:
        run = context.store.resume_run(subject.job.mlflow_run_id, system_metrics=False, fence=fence)
    else:
        run = context.store.start_run(
            work.experiment_id,
            work.run_name,
            parent=work.parent_run_id,
            params={
                "base_model": work.arm.base_model,
                "base_model_revision": work.arm.base_model_revision,
                **{key: value for key, value in work.arm.params.items() if key.startswith("quantization.")},
            },
            tags=collect().tags(),
            description=base_note(work.arm),
            kind="base",
            system_metrics=False,
        )
        context.queue.set_run(subject.token, run.run_id)
        for record in table.evaluation_inputs:
            run.input(record)
    values = record_evaluation(
        context,
        run,
        evaluation,
        table,
        work.arm.evaluation,
        step=step,
        log_examples=work.log_examples,
        tags={EVAL_HASH: subject.job.spec_hash},
        model_id=None if trained is None else trained["model_id"],
    )
    if trained is not None:
        _tag_version(context, trained["model_uri"], values)
    run.end("FINISHED")
    metrics = {key: metric.to_json() for key, metric in evaluation.metrics.items()}
    model_uri = None if trained is None else trained["model_uri"]
    return {"metrics": metrics, "run_id": run.run_id, "model_uri": model_uri, "step": step}


def _tag_version(context: Context, model_uri: str, values: Mapping[str, float]) -> None:
    resolved = context.store.registry.resolve(model_uri)
    if resolved.version is not None:
        tags = {key: repr(value) for key, value in values.items() if not key.endswith(".n")}
        context.store.registry.tag_version(resolved.version.name, resolved.version.version, tags)
