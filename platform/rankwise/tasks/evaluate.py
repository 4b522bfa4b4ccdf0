"""Evaluate stored adapters and bare bases: for evaluate jobs, the `evaluate` command and a promotion's comparison.

All three go through an `Evaluator`: it loads a base and its rows once, attaches the adapters that lie over it, and
measures them and the bare base on the same rows in shared batches. `record_evaluation` writes what one model did to a
run. The command and the gate group models by base first (`group_by_base`); a claimed pack is one group already.
"""

from __future__ import annotations

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
from rankwise.flavor.fetch import Fetched, fetch
from rankwise.flavor.load import describe_quantization, find_base
from rankwise.flavor.metadata import AdapterMetadata, BaseFacts, template_digest
from rankwise.jobs.job import Job, JobKind, Outcome
from rankwise.modeling.adapter import load_adapter
from rankwise.modeling.base import LoadedBase, load_tokenizer, quiet_transformers
from rankwise.modeling.decoding.engine import greedy
from rankwise.modeling.fingerprint import fingerprint_base
from rankwise.modeling.lora.lean import keep_dequantized
from rankwise.modeling.lora.packed import delete_adapter
from rankwise.reporter import Reporter
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.context import Context, Work
from rankwise.tasks.rows import Rows, RowsCache, find_sources
from rankwise.tasks.session import Session, Stoppable, token_of
from rankwise.tasks.setting import Setting, recorded_setting
from rankwise.tasks.submit import run_of_arm
from rankwise.tracking.notes import base_note
from rankwise.tracking.provenance import collect
from rankwise.tracking.registry import link_metrics
from rankwise.tracking.run import Run

BARE = "base"
"""How the setting's bare base is named among the models; another base is `base of URI`."""
_NO_TEMPLATE = "none"
_TEMPLATE = ("chat_template", "chat_template_revision")


def measure(
    base: LoadedBase, rows: Rows, adapters: Sequence[str | None], spec: EvaluationSpec, progress: Reporter
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
    """A base, for people and for comparison.

    Attributes:
        source: What names it.
        revision: Its pin.
        fingerprint: Digest of its content.
        tokenizer: Digest of its tokenizer: two bases whose digests differ may cut a text into other tokens.
        quantization: How it was loaded, in words.
    """

    source: str
    revision: str
    fingerprint: str
    tokenizer: str
    quantization: str

    @classmethod
    def of(cls, base: LoadedBase) -> BaseIdentity:
        """Of a base in memory."""
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
class Group:
    """Models over one base, whose rows have one form.

    Attributes:
        experiment: Of the definition, for messages.
        base: On this machine.
        arm: The setting's rows and metrics over this base.
        bare: How the base alone is named.
        other: Whether it is loaded otherwise than the adapters were trained over it.
        models: The adapters, and `bare` where it is evaluated too.
    """

    experiment: str
    base: ResolvedBase
    arm: ArmSpec
    bare: str
    other: bool = False
    models: list[str] = field(default_factory=list)


def is_plain_directory(uri: str) -> bool:
    """Whether a name is a PEFT directory, which says nothing of its base that could be relied on."""
    return Path(uri).is_dir() and not (Path(uri) / "MLmodel").exists()


def group_by_base(
    context: Context,
    setting: Setting,
    uris: Sequence[str],
    quantization: QuantizationSpec | None,
    metadata: Mapping[str, AdapterMetadata],
) -> list[Group]:
    """Group models by their base; the setting's own base comes first, also where no adapter lies over it.

    Adapters over one base that were trained with different chat templates are groups of their own: each reads the rows
    as it has learned to.

    Args:
        context: The stores.
        setting: On what and by what.
        uris: Stored adapters, or PEFT directories, which are taken to lie over the setting's base.
        quantization: Of all bases, in place of the recorded ones.
        metadata: What each stored adapter says of itself.

    Raises:
        BaseMismatchError: A base was found that is not the recorded one.
        AssetError: A base cannot be had.
    """
    arm = setting.arm
    recorded = {uri: found.base for uri, found in metadata.items()}
    resolved = _own_base(context, arm, recorded)
    chosen = quantization or arm.quantization
    own = Group(
        experiment=setting.spec.name,
        base=resolved,
        arm=arm.model_copy(update={"quantization": chosen}),
        bare=BARE,
        other=describe_quantization(chosen) != describe_quantization(arm.quantization),
    )
    fingerprint = fingerprint_base(resolved.path, context.settings)
    own_base = (fingerprint.digest, describe_quantization(arm.quantization))
    own_template = _template_of(arm, resolved) if metadata else _NO_TEMPLATE
    groups = {(*own_base, own_template): own}
    for uri in uris:
        if (facts := recorded.get(uri)) is None:
            own.models.append(uri)
            continue
        template = metadata[uri].chat_template
        base = (facts.fingerprint.digest, describe_quantization(facts.quantization))
        if base == own_base and template != own_template and _recorded_template(context, uri) is None:
            template = own_template  # Whoever chose the setting knows better.
        key = (*base, template)
        if key not in groups:
            found = find_base(facts, uri, context.settings)
            used = quantization or facts.quantization
            groups[key] = Group(
                experiment=setting.spec.name,
                base=found,
                arm=_over(context, arm, uri, found, used),
                bare=f"{BARE} of {uri}",
                other=describe_quantization(used) != describe_quantization(facts.quantization),
            )
        groups[key].models.append(uri)
    for group in groups.values():
        group.models.append(group.bare)
    return list(groups.values())


def _template_of(arm: ArmSpec, base: ResolvedBase) -> str:
    """The digest of the chat template that an arm's rows are rendered with."""
    dataset = arm.dataset
    with quiet_transformers():
        tokenizer = load_tokenizer(base.path)
    return template_digest(apply_template(tokenizer, dataset.chat_template, dataset.chat_template_revision))


def _own_base(context: Context, arm: ArmSpec, recorded: Mapping[str, BaseFacts]) -> ResolvedBase:
    """The setting's base. Where an adapter over it says what is in it, it may lie elsewhere (`RANKWISE_BASES`)."""
    for uri, facts in recorded.items():
        if (facts.source, facts.revision) == (arm.base_model, arm.base_model_revision):
            return find_base(facts, uri, context.settings)
    return resolve_base(arm.base_model, arm.base_model_revision, context.settings, context.voice)


def _over(context: Context, arm: ArmSpec, uri: str, base: ResolvedBase, quantization: QuantizationSpec) -> ArmSpec:
    """The setting's arm over another base, with the chat template that the adapter there was trained with."""
    # Of a model that was not made by a run of this program: the base's own template.
    template = _recorded_template(context, uri) or dict.fromkeys(_TEMPLATE)
    return arm.model_copy(
        update={
            "base_model": base.source,
            "base_model_revision": base.revision,
            "quantization": quantization,
            "dataset": arm.dataset.model_copy(update=template),
        }
    )


def _recorded_template(context: Context, uri: str) -> dict[str, str | None] | None:
    """The chat template of the definition that an adapter was made from; None where none is recorded."""
    if uri.startswith(("models:", "runs:")):
        with suppress(ConfigError):
            dataset = recorded_setting(context, uri).arm.dataset
            return {name: getattr(dataset, name) for name in _TEMPLATE}
    return None


@dataclass(frozen=True, kw_only=True)
class Assessed:
    """What one model did.

    Attributes:
        evaluation: Metrics and observations.
        uri: The resolved URI; None for a bare base and for a directory.
        base: Over which base.
        bare: The name of that base alone among the assessment's models.
        rows: The rows as that base's tokenizer and template make them.
    """

    evaluation: Evaluation
    uri: str | None
    base: BaseIdentity
    bare: str
    rows: Rows


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What models did.

    Attributes:
        setting: On what.
        models: By the names given, then the bare bases.
        left_out: Rows that were left out since the caller asked for that.
    """

    setting: Setting
    models: dict[str, Assessed]
    left_out: int = 0

    @property
    def results(self) -> dict[str, Evaluation]:
        """The evaluations by name."""
        return {name: model.evaluation for name, model in self.models.items()}

    @property
    def bases(self) -> tuple[BaseIdentity, ...]:
        """The different bases."""
        return tuple(dict.fromkeys(model.base for model in self.models.values()))


class Evaluator:
    """Evaluates models; keeps base and rows between calls."""

    def __init__(self, context: Context, bases: BaseHolder | None = None, rows: RowsCache | None = None) -> None:
        """Load nothing yet; `bases` and `rows` are what a process holds already."""
        self._context = context
        self._bases = bases or BaseHolder(context.settings, context.voice)
        self._rows = rows or RowsCache(context.settings, context.voice)

    def training_rows(self, setting: Setting) -> list[Example]:
        """The rows that a setting's arm is trained on, out of its data.

        Raises:
            AssetError: Base or rows cannot be had.
            DatasetError: The rows do not fit the definition.
        """
        sources = find_sources(setting.arm, self._context.settings, self._context.voice)
        base = self._bases.get(sources.base, setting.arm.quantization)
        return self._rows.get(setting.arm, sources, base.tokenizer).examples.train

    def evaluate(
        self, group: Group, base: LoadedBase, rows: Rows, stored: Mapping[str, Fetched], progress: Reporter
    ) -> dict[str, tuple[Evaluation, str | None]]:
        """Evaluate the models of a group in mixed batches; their adapters are attached meanwhile.

        Args:
            group: The models, in the order of the batches.
            base: Their base in memory.
            rows: The rows.
            stored: The checked files of the stored adapters.
            progress: Told of rows.

        Returns:
            For each model what it did, and the URI that it resolves to (None for the bare base and for a directory).

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
                if adapter not in adapters.values():  # An alias and its version are one adapter.
                    stack.callback(delete_adapter, base.model, adapter)
                adapters[name] = adapter
            order = [adapters[name] for name in group.models]
            results = measure(base, rows, order, group.arm.evaluation, progress)
        return {name: (results[adapters[name]], uris[name]) for name in group.models}

    def assess(
        self,
        setting: Setting,
        uris: Sequence[str],
        *,
        quantization: QuantizationSpec | None = None,
        leave_out: Callable[[Example], bool] | None = None,
    ) -> Assessment:
        """Evaluate models and the bare bases on the same rows; one base after another.

        Every adapter is evaluated over the base that it was trained on. Those over one base share its batches.

        Args:
            setting: On what and by what.
            uris: Stored adapters, or PEFT directories (over the setting's base); `base` among them, or not, is the bare
                base of the setting, which always is.
            quantization: Of the bases; another one than the adapters were trained over gives a warning.
            leave_out: Says of a row whether it is left out.

        Raises:
            ConfigError: There are no rows, or a metric is not known.
            BaseMismatchError: A base was found that is not the recorded one.
            AssetError: Base or rows cannot be had.
        """
        names = [uri for uri in dict.fromkeys(uris) if uri != BARE]
        models: dict[str, Assessed] = {}
        left_out = 0
        with ExitStack() as stack:
            # Once: of a remote store it is a download.
            stored = {
                uri: stack.enter_context(fetch(uri, self._context.settings.tracking_uri))
                for uri in names
                if not is_plain_directory(uri)
            }
            metadata = {uri: found.metadata for uri, found in stored.items()}
            for group in group_by_base(self._context, setting, names, quantization, metadata):
                surplus, models_of_group = self._assess(group, stored, leave_out)
                models |= models_of_group
                if group.bare == BARE:
                    left_out = surplus
        ordered = [*names, *(name for name in models if name not in names)]
        return Assessment(setting=setting, models={name: models[name] for name in ordered}, left_out=left_out)

    def _assess(
        self, group: Group, stored: Mapping[str, Fetched], leave_out: Callable[[Example], bool] | None
    ) -> tuple[int, dict[str, Assessed]]:
        """The models over one base: how many rows were left out, and what the models did."""
        context, arm = self._context, group.arm
        sources = find_sources(arm, context.settings, context.voice, base=group.base, training=False)
        base = self._bases.get(group.base, arm.quantization)
        table = self._rows.get(arm, sources, base.tokenizer)
        examples, _ = table.evaluated
        if not examples:
            raise ConfigError(
                f"{group.experiment} has no evaluation rows: give dataset.eval in the definition, or --data"
            )
        surplus = {example.id for example in examples if leave_out is not None and leave_out(example)}
        used = table.without(surplus) if surplus else table
        results = self.evaluate(group, base, used, stored, context.voice)
        identity = BaseIdentity.of(base)
        return len(surplus), {
            name: Assessed(evaluation=evaluation, uri=uri, base=identity, bare=group.bare, rows=table)
            for name, (evaluation, uri) in results.items()
        }

    def _attach(self, base: LoadedBase, uri: str, stored: Fetched | None, *, other: bool) -> tuple[str, str | None]:
        """Lay an adapter over the base: its name in the model, and the URI that it resolves to."""
        if stored is None:
            name = f"directory-{abs(hash(Path(uri).resolve())):x}"
            load_adapter(base.model, Path(uri), name)
            return name, None
        loaded = flavor.load_model(stored, base=base, settings=self._context.settings, allow_base_mismatch=other)
        return loaded.adapter_name, loaded.origin.uri


def record_evaluation(
    context: Context,
    run: Run,
    evaluation: Evaluation,
    rows: Rows,
    spec: EvaluationSpec,
    *,
    step: int = 0,
    log_examples: bool,
    tags: Mapping[str, str] | None = None,
    model_id: str | None = None,
) -> dict[str, float]:
    """Write what one model did to a run, and its metrics to its LoggedModel; the metrics as they were written.

    Args:
        context: The stores.
        run: The run; it stays open.
        evaluation: What the model did.
        rows: The rows.
        spec: The metrics it was evaluated by.
        step: Of the metrics.
        log_examples: Whether texts of rows may be stored.
        tags: Written with the metrics.
        model_id: The LoggedModel; None where there is none.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    values = to_tracking(evaluation.metrics)
    run.metrics(values, step)
    if tags:
        run.tags(tags)
    run.table(prediction_rows(evaluation, list(spec.metrics), log_examples=log_examples), "predictions.json")
    run.flush()
    if model_id is not None:
        link_metrics(context.store.client, run.run_id, model_id, list(values), step, dataset=rows.inputs[-1])
    return values


def publish_assessment(context: Context, assessment: Assessment, *, note: str = "") -> dict[str, str]:
    """Write every model's results to a run of its own.

    Args:
        context: The stores.
        assessment: What they did.
        note: What is special about it (another quantization), for the runs' names.

    Returns:
        The run id of each model, by its name in the assessment.

    Raises:
        TrackingError: The store cannot be reached or refuses.
    """
    spec = assessment.setting.spec
    experiment_id = context.store.experiment(spec.name, spec)
    runs: dict[str, str] = {}
    for name, model in assessment.models.items():
        uri, record = model.uri, model.rows.inputs[-1]
        run = context.store.start_run(
            experiment_id,
            f"evaluation of {uri or name}{note}",
            params={
                "model": uri or name,
                "data": record.source,
                "base_model": model.base.source,
                "base_model_revision": model.base.revision,
                "quantization": model.base.quantization,
            },
            tags={
                **collect().tags(),
                "rankwise.model_uri": uri,
                "rankwise.base_fingerprint": model.base.fingerprint,
            },
            # Never "base": `compare` takes the last run of that kind for the base on the definition's own rows.
            kind="evaluate",
            system_metrics=False,
        )
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
class _Subject:
    """What one job evaluates: the adapter of a trained arm, or the bare base."""

    job: Job
    token: str
    work: Work
    trained: dict[str, Any] | None

    @property
    def model(self) -> str:
        """What is evaluated, by the name that the evaluator knows it by."""
        return BARE if self.trained is None else str(self.trained["model_uri"])


def evaluate_claimed(session: Session, jobs: Sequence[Job]) -> None:
    """Evaluate the jobs of one claim over one base and report the end of each of them.

    Adapters are loaded by their registered URI, with all checks of the flavor, as any user would.

    Raises:
        RankwiseError: What a person has to mend.
        Exception: A bug.
    """
    context = session.context
    session.phase("load")
    subjects = [_subject(context, job, token_of(job)) for job in jobs]
    arm = subjects[0].work.arm
    sources = find_sources(arm, context.settings, context.voice)
    base = session.bases.get(sources.base, arm.quantization)
    session.phase("tokenize")
    table = session.rows.get(arm, sources, base.tokenizer)
    session.phase("evaluate")
    with ExitStack() as stack:
        stored = _fetch(context, [subject.model for subject in subjects if subject.trained is not None], stack)
        models = [subject.model for subject in subjects]
        group = Group(experiment=subjects[0].work.experiment, base=sources.base, arm=arm, bare=BARE, models=models)
        progress = Stoppable(session, [subject.token for subject in subjects])
        results = Evaluator(context, session.bases, session.rows).evaluate(group, base, table, stored, progress)
    session.phase("upload")
    for subject in subjects:
        if session.authority.cancelled(subject.token):
            session.report(subject.job, Outcome.CANCELLED)
        elif session.may_publish(subject.job):
            evaluation, _ = results[subject.model]
            session.report(subject.job, Outcome.SUCCEEDED, result=_publish(session, subject, table, evaluation))
        else:
            session.report(subject.job, Outcome.PREEMPTED)


def _fetch(context: Context, uris: Sequence[str], stack: ExitStack) -> dict[str, Fetched]:
    """The checked files of adapters, until the stack is closed."""
    if not uris:
        return {}
    with context.voice.task(f"loading {len(uris)} adapters from the registry", len(uris), "adapters") as advance:
        stored = {uri: stack.enter_context(fetch(uri, context.settings.tracking_uri)) for uri in uris}
        advance(len(uris))
    return stored


def _subject(context: Context, job: Job, token: str) -> _Subject:
    work = Work.of(job)
    if work.bare:
        return _Subject(job=job, token=token, work=work, trained=None)
    trained = context.queue.find(JobKind.TRAIN, [work.arm.spec_hash]).get(work.arm.spec_hash)
    if trained is None or trained.result is None:
        raise JobError(f"job {job.id} evaluates arm {work.arm.short}, which has not been trained")
    return _Subject(job=job, token=token, work=work, trained=trained.result)


def _publish(session: Session, subject: _Subject, table: Rows, evaluation: Evaluation) -> dict[str, Any]:
    """Write the results to the arm's run, its LoggedModel and its version; what the job's row is to keep of them."""
    context, work, trained = session.context, subject.work, subject.trained
    fence = session.fence(subject.job)
    # The arm's last step, also where an earlier state was registered: MLflow shows the value of the highest step, and
    # evaluations during training have the same keys.
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
        run.input(table.inputs[-1])
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
    """Show the results at the model version."""
    resolved = context.store.registry.resolve(model_uri)
    if resolved.version is not None:
        shown = {key: repr(value) for key, value in values.items() if not key.endswith(".n")}
        context.store.registry.tag_version(resolved.version.name, resolved.version.version, shown)
