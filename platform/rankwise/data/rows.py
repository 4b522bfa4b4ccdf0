"""Tables to examples: which rows, on which side, with which text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rankwise.assets.progress import SILENT, Advance, Progress
from rankwise.data.conversation import RowMapping, answer_turns, prompt_key
from rankwise.data.renderer import Message, Renderer, RenderError
from rankwise.data.split import choose, split_groups
from rankwise.exceptions import DatasetError

if TYPE_CHECKING:
    from rankwise.assets.dataset import ResolvedData
    from rankwise.experiment.schema import DatasetSpec
    from rankwise.settings import Settings

READ_ROWS = 1000
"""Rows read from a table at a time."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row as a conversation that ends with an answer."""

    id: str
    """The row's `id` column, or its number in the source (from 0)."""
    messages: tuple[Message, ...]
    prompt: str
    """Rendered text up to where the last answer begins, with the generation prompt."""
    completion: str
    """The assistant's last answer."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row as it was, for metrics."""


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows to train on and rows to evaluate on."""

    train: list[Example]
    eval: list[Example]
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by `SIDE: reason`."""
    notes: tuple[str, ...] = ()
    """What a person should know about how the rows were read; preflight shows them as warnings."""


def load_examples(
    dataset: DatasetSpec,
    train: ResolvedData | None,
    eval: ResolvedData | None,
    renderer: Renderer,
    settings: Settings,
    progress: Progress | None = None,
) -> Examples:
    """Read the definition's tables and make examples of their rows; see `build_examples`.

    Raises:
        AssetError: A table cannot be read.
        DatasetError: The rows do not fit the definition.
    """
    from rankwise.assets.dataset import load_table

    return build_examples(
        dataset,
        None if train is None else load_table(train, settings, progress),
        None if eval is None else load_table(eval, settings, progress),
        renderer,
        progress,
    )


def build_examples(
    dataset: DatasetSpec,
    train_table: Any | None,
    eval_table: Any | None,
    renderer: Renderer,
    progress: Progress | None = None,
) -> Examples:
    """Make examples of tables (`datasets.Dataset`).

    With `dataset.eval` a split, `split_groups` takes the evaluation rows out of the training table. Then
    `dataset.limit` chooses on each side (`choose`, with the split's seed, or 0). Only what was chosen is rendered.
    Rows with an empty cell in a column that the templates use, and chats without an answer, are left out and counted.

    Args:
        dataset: The definition's section.
        train_table: Rows to train on; None to make examples of `eval_table` alone, where only these are needed.
        eval_table: Rows to evaluate on; None where there are none, or where they are a split of the others.
        renderer: Makes texts of conversations.
        progress: Told of rows done.

    Raises:
        DatasetError: The rows do not fit the definition, or the chat template refuses one.
    """
    notes: list[str] = []
    dropped: dict[str, int] = {}
    shown = progress or SILENT
    with shown.task("reading rows", len(train_table or ()) + len(eval_table or ()), "rows") as advance:
        train = None if train_table is None else _Table.scan(train_table, dataset, "train", notes, dropped, advance)
        evaluation = None if eval_table is None else _Table.scan(eval_table, dataset, "eval", notes, dropped, advance)
    seed = 0
    train_rows = [] if train is None else list(range(len(train.ids)))
    eval_source, eval_rows = evaluation, [] if evaluation is None else list(range(len(evaluation.ids)))
    if dataset.eval is not None and not isinstance(dataset.eval, str) and evaluation is None:
        assert train is not None, "a split needs the table that it is taken from"
        seed = dataset.eval.seed
        split = split_groups(train.groups, dataset.eval.rows, seed)
        train_rows, eval_source, eval_rows = split.train, train, split.eval
        if split.left_out:
            dropped["split: shares a prompt with evaluation rows"] = len(split.left_out)
    limit = dataset.limit
    if train is not None:
        train_rows = _limited(train, train_rows, limit.train, seed, "train", notes)
    if eval_source is not None:
        eval_rows = _limited(eval_source, eval_rows, limit.eval, seed, "eval", notes)
    with shown.task("rendering prompts", len(train_rows) + len(eval_rows), "rows") as advance:
        return Examples(
            train=[] if train is None else train.examples(train_rows, renderer, advance),
            eval=[] if eval_source is None else eval_source.examples(eval_rows, renderer, advance),
            dropped=dropped,
            notes=tuple(notes),
        )


def _limited(table: _Table, rows: list[int], limit: int | None, seed: int, side: str, notes: list[str]) -> list[int]:
    if limit is not None and limit > len(rows):
        notes.append(f"dataset.limit.{side} is {limit:,}, but there are only {len(rows):,} rows")
    return [rows[place] for place in choose([table.ids[row] for row in rows], limit, seed, side)]


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The usable rows of a table: where each lies, its id and its group. The rows themselves are read when chosen."""

    table: Any
    mapping: RowMapping
    positions: list[int]
    ids: list[str]
    groups: list[str]

    @classmethod
    def scan(
        cls, table: Any, dataset: DatasetSpec, side: str, notes: list[str], dropped: dict[str, int], advance: Advance
    ) -> _Table:
        mapping = RowMapping.of(dataset, table.column_names, side)
        row_ids = _row_ids(table, side, notes)
        positions, ids, groups = [], [], []
        reasons: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        tails = 0
        for position, row in _iterate(table):
            if position % READ_ROWS == 0:
                advance(min(READ_ROWS, len(table) - position))
            conversion = mapping.convert(row, row_ids[position])
            unused.update(conversion.unused_keys)
            tails += conversion.unanswered_tail
            if conversion.left_out is not None:
                reasons[conversion.left_out] += 1
                continue
            positions.append(position)
            ids.append(row_ids[position])
            groups.append(prompt_key(conversion.messages))
        dropped.update({f"{side}: {reason}": count for reason, count in reasons.items()})
        for key, count in unused.items():
            notes.append(f"{side}: messages of {count:,} rows have a key {key!r}, which is not used")
        if tails:
            notes.append(f"{side}: {tails:,} rows go on after the assistant's last turn; these turns are not used")
        if not positions:
            why = ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items()) or "the table is empty"
            raise DatasetError(f"dataset.{side}: no row of {len(row_ids):,} can be used: {why}")
        return cls(table=table, mapping=mapping, positions=positions, ids=ids, groups=groups)

    def examples(self, rows: Sequence[int], renderer: Renderer, advance: Advance) -> list[Example]:
        examples: list[Example] = []
        for first in range(0, len(rows), READ_ROWS):
            block = rows[first : first + READ_ROWS]
            picked = self.table.select([self.positions[row] for row in block])
            ids = [self.ids[row] for row in block]
            cells = [row for _, row in _iterate(picked)]
            chats = [
                self.mapping.with_system(self.mapping.convert(row, row_id).messages)
                for row, row_id in zip(cells, ids, strict=True)
            ]
            turns = [answer_turns(chat)[-1] for chat in chats]
            try:
                prompts = renderer.texts(
                    [chat[:turn] for chat, turn in zip(chats, turns, strict=True)], add_generation_prompt=True
                )
            except RenderError as error:
                raise DatasetError(f"Row {ids[error.index]}: {error}") from error
            for row, row_id, chat, turn, prompt in zip(cells, ids, chats, turns, prompts, strict=True):
                examples.append(
                    Example(id=row_id, messages=chat, prompt=prompt, completion=chat[turn]["content"], columns=row)
                )
            advance(len(block))
        return examples


def _iterate(table: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    names = list(table.column_names)
    position = 0
    for batch in table.iter(batch_size=READ_ROWS):
        for values in zip(*(batch[name] for name in names), strict=True):
            yield position, dict(zip(names, values, strict=True))
            position += 1


def _row_ids(table: Any, side: str, notes: list[str]) -> list[str]:
    numbers = [str(number) for number in range(len(table))]
    if "id" not in table.column_names:
        return numbers
    given = list(table["id"])
    usable = all(isinstance(value, (str, int)) and not isinstance(value, bool) for value in given)
    texts = [str(value) for value in given]
    if usable and len(set(texts)) == len(texts):
        return texts
    reason = "has repeated values" if usable else "has cells that are neither a text nor a whole number"
    notes.append(f"{side}: the id column {reason}; rows are named by their number in the source instead")
    return numbers
