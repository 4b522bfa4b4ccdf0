"""Bases and rows of arms: located on this machine, pinned, tokenized once per distinct table, checked, previewed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.assets.dataset import ResolvedData, resolve_data
from rankwise.assets.input_checks import confine
from rankwise.data.documents import windows
from rankwise.data.formats import RowMapping
from rankwise.data.preflight import Report, is_documents, preflight, render_html, render_terminal
from rankwise.data.rows import Example, Examples, first_rows, load_examples
from rankwise.data.template import Renderer, is_template_file
from rankwise.data.tokens import EncodedSet, encode
from rankwise.data.training_table import open_table
from rankwise.digests import canonical_json
from rankwise.exceptions import ConfigError, DatasetError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment
from rankwise.experiment.metric_names import needs_generation
from rankwise.experiment.schema import DatasetSpec
from rankwise.modeling.estimate import Estimator, match_targets
from rankwise.reporter import Reporter
from rankwise.settings import Settings
from rankwise.tasks.context import Context
from rankwise.tracking.registry import Registry
from rankwise.tracking.values import DatasetRecord


@dataclass(frozen=True, kw_only=True)
class ArmSources:
    """An arm's base and tables on this machine; `train` is None if the training rows are not needed."""

    base: ResolvedBase
    train: ResolvedData | None
    eval: ResolvedData | None


def find_data(dataset: DatasetSpec, settings: Settings, progress: Reporter) -> tuple[ResolvedData, ResolvedData | None]:
    """Resolve the training rows, and the evaluation rows if they have a source of their own."""
    train = resolve_data(dataset.train, dataset.train_revision, settings, dataset.train_split, dataset.name, progress)
    if not isinstance(dataset.eval, str):
        return train, None
    return train, _find_eval(dataset, dataset.eval, settings, progress)


def _find_eval(dataset: DatasetSpec, source: str, settings: Settings, progress: Reporter) -> ResolvedData:
    return resolve_data(
        source, dataset.eval_revision, settings, dataset.eval_split, dataset.name, progress, key="eval_revision"
    )


def find_sources(
    arm: ArmSpec, settings: Settings, progress: Reporter, *, base: ResolvedBase | None = None, training: bool = True
) -> ArmSources:
    """Resolve an arm's base, unless given, and tables.

    Without `training`, training rows are resolved only if the evaluation rows are split off them.
    """
    base = base or resolve_base(arm.base_model, arm.base_model_revision, settings, progress)
    if not training and isinstance(arm.dataset.eval, str):
        return ArmSources(base=base, train=None, eval=_find_eval(arm.dataset, arm.dataset.eval, settings, progress))
    train, evaluation = find_data(arm.dataset, settings, progress)
    return ArmSources(base=base, train=train, eval=evaluation)


def pin(experiment: Experiment, settings: Settings, progress: Reporter, registry: Registry) -> Experiment:
    """Fetch base and rows, and fill in every missing pin of a definition; `init_from` gets a version for its alias."""
    spec = experiment.spec
    base = resolve_base(spec.base_model, spec.base_model_revision, settings, progress)
    train, evaluation = find_data(spec.dataset, settings, progress)
    return experiment.with_pins(
        base_model_revision=base.revision,
        train_revision=train.revision,
        eval_revision=None if evaluation is None else evaluation.revision,
        init_from=None if spec.init_from is None else registry.resolve(spec.init_from).uri,
    )


@dataclass(frozen=True, kw_only=True)
class ArmRows:
    """Tokenized rows of an arm; `eval` follows the order of `examples.eval`, `inputs` are MLflow's data set records."""

    examples: Examples
    train: EncodedSet
    eval: EncodedSet
    renderer: Renderer
    inputs: tuple[DatasetRecord, ...]

    @property
    def evaluated(self) -> tuple[list[Example], EncodedSet]:
        """The evaluation examples that have tokens, and these tokens, in the same order."""
        kept = set(self.eval.ids)
        return [example for example in self.examples.eval if example.id in kept], self.eval

    def without(self, ids: Collection[str]) -> ArmRows:
        """A copy without these evaluation rows; `inputs` still describes the whole data set."""
        return replace(self, eval=EncodedSet.of(row for row in self.eval if row.id not in ids))


class RowsCache:
    """Tokenized rows, cached by everything that determines them."""

    def __init__(self, settings: Settings, progress: Reporter) -> None:
        """Start empty."""
        self._settings = settings
        self._progress = progress
        self._rows: dict[bytes, ArmRows] = {}

    def get(self, arm: ArmSpec, sources: ArmSources, tokenizer: Any) -> ArmRows:
        """Return the rows of an arm; `tokenizer` is the base's own and is not modified.

        Raises:
            DatasetError: The rows do not fit the definition.
        """
        whole = sources.train is not None
        parts = [str(sources.base.path), arm.dataset.model_dump(mode="json"), arm.training.max_length, whole]
        key = canonical_json(parts)
        if key not in self._rows:
            self._rows[key] = self._load(arm, sources, tokenizer)
        return self._rows[key]

    def _load(self, arm: ArmSpec, sources: ArmSources, tokenizer: Any) -> ArmRows:
        template = arm.dataset.chat_template
        if template is not None and is_template_file(template):
            confine(Path(template).expanduser().absolute(), self._settings, "dataset.chat_template")
        renderer = Renderer.create(
            tokenizer,
            template,
            base=sources.base.path,
            template_revision=arm.dataset.chat_template_revision,
            chat_template_kwargs=arm.dataset.chat_template_kwargs,
            required=False,
        )
        examples = load_examples(arm.dataset, sources.train, sources.eval, renderer, self._settings, self._progress)
        _check_metrics(arm, examples)
        train = self._encode(examples.train, renderer, arm, joined=True)
        evaluation = self._encode(examples.eval, renderer, arm, joined=False)
        sides = {"train": (sources.train, examples.train, train)}
        sides["eval"] = (sources.eval or sources.train, examples.eval, evaluation)
        return ArmRows(
            examples=examples,
            train=train,
            eval=evaluation,
            renderer=renderer,
            inputs=tuple(
                _record(context, source.source, source.revision, side_examples, tokens)
                for context, (source, side_examples, tokens) in sides.items()
                if source is not None
            ),
        )

    def _encode(self, examples: Sequence[Example], renderer: Renderer, arm: ArmSpec, *, joined: bool) -> EncodedSet:
        max_length = arm.training.max_length
        if is_documents(examples):
            return windows(examples, renderer, max_length, joined=joined, progress=self._progress)
        return encode(
            examples,
            renderer,
            max_length,
            self._settings,
            self._progress,
            supervise=arm.dataset.supervise,
            overlong="whole_answers" if arm.dataset.rendering == 1 else arm.dataset.overlong or "auto",
        )


def _check_metrics(arm: ArmSpec, examples: Examples) -> None:
    needing = [metric for metric in arm.evaluation.metrics if needs_generation([metric])]
    if needing and is_documents(examples.train or examples.eval):
        raise DatasetError(
            f"evaluation.metrics: {', '.join(needing)} cannot be used with rows of the format text, which have no "
            "question to answer; allowed are metrics of the loss: loss, token_accuracy"
        )


def _record(
    context: Any, source: str, revision: str, examples: Sequence[Example], encoded: EncodedSet
) -> DatasetRecord:
    scheme = source.partition(":")[0]
    kind = "pypi" if scheme == "pypi" else ("local" if revision.startswith("sha256:") else "hugging_face")
    columns = examples[0].columns if examples else {}
    return DatasetRecord(
        name=Path(source.rpartition("#")[2]).name,
        digest=encoded.digest,
        source=f"{source}@{revision}",
        source_type=kind,
        context=context,
        columns={name: type(value).__name__ for name, value in columns.items()},
        profile={
            "num_rows": len(encoded),
            "num_tokens": encoded.tokens,
            "num_supervised_tokens": encoded.supervised_tokens,
        },
    )


_PREVIEWED = 3


def check_names(context: Context, sourced_arms: Sequence[tuple[ArmSpec, ArmSources]]) -> None:
    """Check names (attention, modules, columns) before a base is loaded, which takes minutes if it is large.

    Raises:
        ConfigError: Lists every name that the base or a table lacks.
    """
    bases = {
        (path, towers): Estimator(path, towers=towers)
        for path, towers in {(sources.base.path, arm.towers) for arm, sources in sourced_arms}
    }
    lookups: dict[object, Callable[[], object]] = {}
    for arm, sources in sourced_arms:
        path, targets = (sources.base.path, arm.towers), arm.lora.target_modules
        lookups[path, targets] = partial(match_targets, bases[path].linear, targets)
        lookups[path, arm.attn_implementation] = partial(bases[path].check_attention, arm.attn_implementation)
        lookups[path, arm.quantization] = partial(bases[path].check_quantization, arm.quantization, arm.base_model)
        reading = canonical_json(arm.dataset.model_dump(mode="json"))
        for side, data in (("train", sources.train), ("eval", sources.eval)):
            lookups[reading, data, side] = partial(_check_columns, context, arm.dataset, data, side)
    problems: dict[str, None] = {}
    for lookup in lookups.values():
        try:
            lookup()
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise ConfigError("\n".join(problems), tuple(problems))


def _check_columns(context: Context, dataset: DatasetSpec, data: ResolvedData | None, side: str) -> None:
    if data is not None:
        table = open_table(dataset, data, context.settings, context.reporter)
        RowMapping.of(dataset, table.column_names, side, first_rows(table))


def _counted(encoded: EncodedSet, examples: Sequence[Example]) -> str:
    if is_documents(examples):
        return f"{len(encoded):,} windows of {len(examples):,} documents"
    conversations = len(set(encoded.ids))
    of = f" of {conversations:,} conversations" if conversations < len(encoded) else ""
    return f"{len(encoded):,} rows{of}"


def check_rows(reporter: Reporter, arm: ArmSpec, vocab_size: int, rows: ArmRows, *, show: bool) -> tuple[Report, str]:
    """Run the preflight, report its warnings, and render the preview; returns the report and the preview as HTML.

    Raises:
        DatasetError: Lists every error.
    """
    report = preflight(
        rows.examples,
        rows.train,
        rows.eval if rows.examples.eval else None,
        rows.renderer,
        max_length=arm.training.max_length,
        vocab_size=vocab_size,
        supervise=arm.dataset.supervise,
    )
    for finding in report.warnings:
        reporter.warn(str(finding))
    report.raise_for_errors()
    first = [rows.train[index] for index in range(min(_PREVIEWED, len(rows.train)))]
    if show:
        counts = f"{_counted(rows.train, rows.examples.train)} to train on, {len(rows.eval):,} to evaluate on"
        reporter.say(f"rows: {counts}; the first ones, supervised tokens marked:")
        reporter.show(render_terminal(first, rows.renderer.tokenizer))
    return report, render_html(first, rows.renderer.tokenizer)
