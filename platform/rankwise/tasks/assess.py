"""Evaluate stored adapters and the bare base on rows of one's choice, over one base in memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import rankwise.flavor as flavor
from rankwise.evaluation.evaluator import Evaluation
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.loader import load_experiment, parse_experiment
from rankwise.experiment.schema import ExperimentSpec, QuantizationSpec
from rankwise.experiment.sweep import expand, is_search
from rankwise.jobs.job import JobKind
from rankwise.modeling.adapter import load_adapter
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.packed_lora import delete_adapter
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.context import Context
from rankwise.tasks.measure import measure
from rankwise.tasks.payload import Work
from rankwise.tasks.prepare import find_sources
from rankwise.tasks.recorded import recorded_definition
from rankwise.tasks.rows import Rows, RowsCache

BARE = "base"
"""How the bare base is named among the models."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What models are evaluated on and by.

    Attributes:
        spec: The definition that it comes from.
        arm: Its base, rows and metrics; the adapter in it takes no part.
    """

    spec: ExperimentSpec
    arm: ArmSpec

    def changed(self, *, data: str | None = None, metrics: Sequence[str] = (), limit: int | None = None) -> Setting:
        """The same on other rows, by other metrics.

        Args:
            data: A source of rows with the same columns, in place of the definition's evaluation rows.
            metrics: Names of metrics.
            limit: Evaluate no more rows than this.
        """
        arm = self.arm
        dataset, evaluation = arm.dataset, arm.evaluation
        if data is not None:
            source = str(Path(data).absolute()) if Path(data).exists() else data
            dataset = dataset.model_copy(update={"eval": source, "eval_revision": None})
        if limit is not None:
            dataset = dataset.model_copy(update={"limit": dataset.limit.model_copy(update={"eval": limit})})
        if metrics:
            evaluation = evaluation.model_copy(update={"metrics": tuple(metrics)})
        return Setting(spec=self.spec, arm=arm.model_copy(update={"dataset": dataset, "evaluation": evaluation}))


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What models did.

    Attributes:
        setting: On what.
        rows: The rows.
        base: Over what.
        results: By the names given.
        models: The resolved URI of each name; None for the bare base and for directories.
    """

    setting: Setting
    rows: Rows
    base: LoadedBase
    results: dict[str, Evaluation]
    models: dict[str, str | None]


def recorded_setting(context: Context, uri: str, file: Path | None = None) -> Setting:
    """The rows and metrics that a stored adapter was evaluated by.

    Args:
        context: The stores.
        uri: `models:/NAME/VERSION` or `models:/NAME@ALIAS`; its run has recorded the definition.
        file: A definition to take in place of the recorded one.

    Raises:
        ConfigError: No definition is recorded, or the file is not valid.
        TrackingError: There is no such version.
    """
    spec = load_experiment(file) if file is not None else parse_experiment(recorded_definition(context, uri), uri)
    return Setting(spec=spec, arm=_arm(context, spec, uri))


def _arm(context: Context, spec: ExperimentSpec, uri: str) -> ArmSpec:
    """The arm behind a version: as the queue has it, else as the definition gives it."""
    version = context.store.registry.resolve(uri).version if uri.startswith("models:") else None
    spec_hash = "" if version is None else version.tags.get("rankwise.spec_hash", "")
    if job := context.queue.find(JobKind.TRAIN, [spec_hash]).get(spec_hash):
        return Work.of(job).arm
    arms = () if is_search(spec) else expand(spec)
    return next((arm for arm in arms if arm.spec_hash == spec_hash), ArmSpec.of(spec))


class Assessor:
    """Evaluates; keeps base and rows between calls."""

    def __init__(self, context: Context) -> None:
        """Nothing is loaded yet."""
        self._context = context
        self._bases = BaseHolder(context.settings, context.voice)
        self._rows = RowsCache(context.settings, context.voice)

    def rows(self, setting: Setting, quantization: QuantizationSpec | None = None) -> Rows:
        """The rows of a setting.

        Raises:
            AssetError: Base or rows cannot be had.
            DatasetError: The rows do not fit the definition.
        """
        sources = find_sources(setting.arm, self._context.settings, self._context.voice)
        base = self._bases.get(sources.base, quantization or setting.arm.quantization)
        return self._rows.get(setting.arm, sources, base.tokenizer)

    def assess(
        self, setting: Setting, uris: Sequence[str], *, quantization: QuantizationSpec | None = None
    ) -> Assessment:
        """Evaluate models and the bare base on the same rows, in mixed batches.

        Args:
            setting: On what and by what.
            uris: Stored adapters, or PEFT directories; `base` among them, or not, is the bare base, which always is.
            quantization: Of the base; another one than the adapters were trained over gives a warning.

        Raises:
            ConfigError: There are no rows, or a metric is not known.
            BaseMismatchError: An adapter was trained on another base than the setting's.
            AssetError: Base or rows cannot be had.
        """
        context = self._context
        chosen = quantization or setting.arm.quantization
        sources = find_sources(setting.arm, context.settings, context.voice)
        base = self._bases.get(sources.base, chosen)
        table = self._rows.get(setting.arm, sources, base.tokenizer)
        if not table.evaluated[0]:
            raise ConfigError(
                f"{setting.spec.name} has no evaluation rows: give dataset.eval in the definition, or --data"
            )
        names = [uri for uri in dict.fromkeys(uris) if uri != BARE]
        with ExitStack() as stack:
            adapters: dict[str, str | None] = {}
            models: dict[str, str | None] = {BARE: None}
            for uri in names:
                adapter, models[uri] = self._attach(base, uri, other=chosen != setting.arm.quantization)
                stack.callback(delete_adapter, base.model, adapter)
                adapters[uri] = adapter
            adapters[BARE] = None
            found = measure(base, table, list(adapters.values()), setting.arm.evaluation, context.voice)
        results = {name: found[adapter] for name, adapter in adapters.items()}
        return Assessment(setting=setting, rows=table, base=base, results=results, models=models)

    def _attach(self, base: LoadedBase, uri: str, *, other: bool) -> tuple[str, str | None]:
        """Lay an adapter over the base: its name in the model, and the URI that it resolves to."""
        directory = Path(uri)
        if directory.is_dir() and not (directory / "MLmodel").exists():
            name = f"directory-{abs(hash(directory.resolve())):x}"
            load_adapter(base.model, directory, name)
            return name, None
        loaded = flavor.load_model(
            uri, base=base, settings=self._context.settings, allow_base_mismatch=other,
            tracking_uri=self._context.settings.tracking_uri,
        )  # fmt: skip
        return loaded.adapter_name, loaded.origin.uri
