"""Evaluate stored adapters and the bare bases on rows of one's choice, each over the base that it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import rankwise.flavor as flavor
from rankwise.data.rows import Example
from rankwise.evaluation.evaluator import Evaluation
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import QuantizationSpec
from rankwise.flavor.fetch import Fetched, fetch
from rankwise.modeling.adapter import load_adapter
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.packed_lora import delete_adapter
from rankwise.tasks.base_groups import BARE, BaseIdentity, Group, group_by_base, is_plain_directory
from rankwise.tasks.bases import BaseHolder
from rankwise.tasks.context import Context
from rankwise.tasks.measure import measure
from rankwise.tasks.prepare import find_sources
from rankwise.tasks.rows import Rows, RowsCache
from rankwise.tasks.setting import Setting


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


class Assessor:
    """Evaluates; keeps base and rows between calls."""

    def __init__(self, context: Context) -> None:
        """Nothing is loaded yet."""
        self._context = context
        self._bases = BaseHolder(context.settings, context.voice)
        self._rows = RowsCache(context.settings, context.voice)

    def training_rows(self, setting: Setting) -> list[Example]:
        """The rows that a setting's arm is trained on, out of its data.

        Raises:
            AssetError: Base or rows cannot be had.
            DatasetError: The rows do not fit the definition.
        """
        sources = find_sources(setting.arm, self._context.settings, self._context.voice)
        base = self._bases.get(sources.base, setting.arm.quantization)
        return self._rows.get(setting.arm, sources, base.tokenizer).examples.train

    def assess(
        self,
        setting: Setting,
        uris: Sequence[str],
        *,
        quantization: QuantizationSpec | None = None,
        leave_out: Callable[[Example], bool] | None = None,
    ) -> Assessment:
        """Evaluate models and the bare bases on the same rows, in mixed batches; one base after another.

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
                rows, models_of_group = self._assess(group, stored, leave_out)
                models |= models_of_group
                if group.bare == BARE:
                    left_out = rows
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
        with ExitStack() as stack:
            adapters: dict[str, str | None] = {}
            resolved: dict[str, str | None] = {group.bare: None}
            for uri in group.uris:
                adapter, resolved[uri] = self._attach(base, uri, stored.get(uri), other=group.other)
                if adapter not in adapters.values():  # An alias and its version are one adapter.
                    stack.callback(delete_adapter, base.model, adapter)
                adapters[uri] = adapter
            adapters[group.bare] = None
            found = measure(base, used, list(adapters.values()), arm.evaluation, context.voice)
        identity = BaseIdentity.of(base)
        return len(surplus), {
            name: Assessed(evaluation=found[adapter], uri=resolved[name], base=identity, bare=group.bare, rows=table)
            for name, adapter in adapters.items()
        }

    def _attach(self, base: LoadedBase, uri: str, stored: Fetched | None, *, other: bool) -> tuple[str, str | None]:
        """Lay an adapter over the base: its name in the model, and the URI that it resolves to."""
        if stored is None:
            name = f"directory-{abs(hash(Path(uri).resolve())):x}"
            load_adapter(base.model, Path(uri), name)
            return name, None
        loaded = flavor.load_model(stored, base=base, settings=self._context.settings, allow_base_mismatch=other)
        return loaded.adapter_name, loaded.origin.uri
