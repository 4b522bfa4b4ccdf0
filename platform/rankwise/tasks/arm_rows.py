"""Bases and rows of arms: located on this machine, pinned, tokenized once per distinct table, checked, previewed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.assets.dataset import ResolvedData, resolve_data
from rankwise.assets.input_checks import confine
from rankwise.data.documents import windows
from rankwise.data.formats import RowMapping
from rankwise.data.preflight import Report, is_documents, preflight
from rankwise.data.rows import Example, Examples, Side, first_rows, load_examples, single_sources
from rankwise.data.template import Renderer, is_template_file
from rankwise.data.token_preview import render_html, render_terminal
from rankwise.data.tokens import Encoded, EncodedSet, encode
from rankwise.data.training_table import open_table
from rankwise.digests import canonical_json
from rankwise.exceptions import ConfigError, DatasetError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment
from rankwise.experiment.metric_names import needs_generation
from rankwise.experiment.schema import DatasetSpec, Revisions
from rankwise.modeling.estimate import Estimator, match_targets
from rankwise.reporter import Reporter
from rankwise.settings import Settings
from rankwise.tasks.context import Context
from rankwise.tracking.registry import Registry
from rankwise.tracking.values import DatasetRecord


@dataclass(frozen=True, kw_only=True)
class ArmSources:
    """An arm's base and tables on this machine, one for each source.

    `train` is None if the training rows are not needed, `eval` if there are no evaluation rows of their own.
    """

    base: ResolvedBase
    train: tuple[ResolvedData, ...] | None
    eval: tuple[ResolvedData, ...] | None

    def revisions(self, dataset: DatasetSpec) -> Revisions:
        """The pins of the tables, which are those of `dataset`."""
        sides = [(dataset.train_sources, self.train), (dataset.eval_sources, self.eval)]
        return {
            (source.source, source.revision): data.revision
            for sources, tables in sides
            if tables is not None
            for source, data in zip(sources, tables, strict=True)
        }


def find_data(
    dataset: DatasetSpec, settings: Settings, progress: Reporter
) -> tuple[tuple[ResolvedData, ...], tuple[ResolvedData, ...] | None]:
    """Resolve the sources of the training rows, and those of the evaluation rows if they have some of their own."""
    return _find(dataset, "train", settings, progress), _find(dataset, "eval", settings, progress) or None


def _find(dataset: DatasetSpec, side: Side, settings: Settings, progress: Reporter) -> tuple[ResolvedData, ...]:
    sources = dataset.train_sources if side == "train" else dataset.eval_sources
    listed = isinstance(getattr(dataset, side), tuple)
    found = []
    for place, source in enumerate(sources):
        single = dataset.single(source, side)
        key = f"dataset.{side}[{place}].revision" if listed else f"{side}_revision"
        found.append(
            resolve_data(source.source, source.revision, settings, single.train_split, single.name, progress, key=key)
        )
    return tuple(found)


def find_sources(
    arm: ArmSpec, settings: Settings, progress: Reporter, *, base: ResolvedBase | None = None, training: bool = True
) -> ArmSources:
    """Resolve an arm's base, unless given, and tables.

    Without `training`, training rows are resolved only if the evaluation rows are split off them.
    """
    base = base or resolve_base(arm.base_model, arm.base_model_revision, settings, progress)
    if not training and arm.dataset.eval_sources:
        return ArmSources(base=base, train=None, eval=_find(arm.dataset, "eval", settings, progress))
    train, evaluation = find_data(arm.dataset, settings, progress)
    return ArmSources(base=base, train=train, eval=evaluation)


def pin(experiment: Experiment, settings: Settings, progress: Reporter, registry: Registry) -> Experiment:
    """Fetch base and rows, and fill in every missing pin of a definition; `init_from` gets a version for its alias."""
    spec = experiment.spec
    base = resolve_base(spec.base_model, spec.base_model_revision, settings, progress)
    revisions: dict[tuple[str, str | None], str] = {}
    # Arms may have sources of their own; those that they share are resolved once.
    datasets = {
        (dataset.train, dataset.train_revision): dataset
        for dataset in (spec.dataset, *(arm.dataset for arm in experiment.arms))
    }
    for dataset in datasets.values():
        train, evaluation = find_data(dataset, settings, progress)
        revisions |= ArmSources(base=base, train=train, eval=evaluation).revisions(dataset)
    return experiment.with_pins(
        base_model_revision=base.revision,
        revisions=revisions,
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

    @property
    def evaluation_inputs(self) -> tuple[DatasetRecord, ...]:
        """The records of the evaluation rows, one for each source."""
        return tuple(record for record in self.inputs if record.context == "eval")

    def first_rows(self, count: int) -> list[Encoded]:
        """The first `count` training rows of each source."""
        source_of = {example.id: example.source for example in self.examples.train}
        left = dict.fromkeys(source_of.values(), count)
        shown = []
        for row in self.train:
            if not any(left.values()):
                break
            if left[source_of[row.id]]:
                left[source_of[row.id]] -= 1
                shown.append(row)
        return shown

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
        sides: tuple[tuple[Side, tuple[ResolvedData, ...] | None, Sequence[Example], EncodedSet], ...] = (
            ("train", sources.train, examples.train, train),
            ("eval", sources.eval or sources.train, examples.eval, evaluation),
        )
        return ArmRows(
            examples=examples,
            train=train,
            eval=evaluation,
            renderer=renderer,
            inputs=tuple(
                record
                for context, resolved, side_examples, tokens in sides
                if resolved is not None
                for record in _records(context, arm.dataset, resolved, side_examples, tokens)
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


def _records(
    context: Side,
    dataset: DatasetSpec,
    resolved: Sequence[ResolvedData],
    examples: Sequence[Example],
    encoded: EncodedSet,
) -> Iterator[DatasetRecord]:
    """A record for each source of a side."""
    listed = dataset.train if context == "train" or not dataset.eval_sources else dataset.eval
    if not isinstance(listed, tuple):
        (data,) = resolved
        yield _record(context, data.source, data.revision, examples, encoded)
        return
    for source, data in zip(listed, resolved, strict=True):
        rows = [example for example in examples if example.source == source.named]
        if not rows:
            continue
        ids = {row.id for row in rows}
        part = EncodedSet.of(row for row in encoded if row.id in ids)
        yield _record(context, data.source, data.revision, rows, part)


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
        sides: tuple[tuple[Side, tuple[ResolvedData, ...] | None], ...]
        sides = ("train", sources.train), ("eval", sources.eval)
        for side, tables in sides:
            for (label, single), data in zip(single_sources(arm.dataset, side), tables or (), strict=False):
                name = f"{side} {label}" if label else side
                lookups[reading, data, name] = partial(_check_columns, context, single, data, name)
    problems: dict[str, None] = {}
    for lookup in lookups.values():
        try:
            lookup()
        except ConfigError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise ConfigError("\n".join(problems), tuple(problems))


def _check_columns(context: Context, dataset: DatasetSpec, data: ResolvedData, side: str) -> None:
    table = open_table(dataset, data, context.settings, context.reporter)
    RowMapping.of(dataset, table.column_names, side, first_rows(table))


def _counted(encoded: EncodedSet, examples: Sequence[Example]) -> str:
    if is_documents(examples):
        return f"{len(encoded):,} windows of {len(examples):,} documents"
    conversations = len(set(encoded.ids))
    of = f" of {conversations:,} conversations" if conversations < len(encoded) else ""
    return f"{len(encoded):,} rows{of}"


def preflight_rows(arm: ArmSpec, rows: ArmRows, vocab_size: int | None = None) -> Report:
    """The preflight of an arm's rows; `vocab_size` None leaves out the checks against the base's embedding."""
    return preflight(
        rows.examples,
        rows.train,
        rows.eval if rows.examples.eval else None,
        rows.renderer,
        max_length=arm.training.max_length,
        vocab_size=vocab_size,
        supervise=arm.dataset.supervise,
    )


def check_rows(reporter: Reporter, arm: ArmSpec, vocab_size: int, rows: ArmRows, *, show: bool) -> tuple[Report, str]:
    """Run the preflight, report its warnings, and render the preview; returns the report and the preview as HTML.

    Raises:
        DatasetError: Lists every error.
    """
    report = preflight_rows(arm, rows, vocab_size)
    for finding in report.warnings:
        reporter.warn(str(finding))
    report.raise_for_errors()
    first = rows.first_rows(_PREVIEWED)
    if show:
        sources = Counter(example.source for example in rows.examples.train if example.source)
        shares = f" ({', '.join(f'{label} {count:,}' for label, count in sources.items())})" if sources else ""
        trained = f"{_counted(rows.train, rows.examples.train)} to train on{shares}"
        counts = f"{trained}, {len(rows.eval):,} to evaluate on"
        reporter.say(f"rows: {counts}; the first ones, supervised tokens marked:")
        reporter.show(render_terminal(first, rows.renderer.tokenizer))
    return report, render_html(first, rows.renderer.tokenizer)
