"""Table rows to examples: conversations, the train/eval split, and limits.

Split and limits order rows by a SHA-256 of the seed and of the row, not by a random generator, so the choice is the
same on every machine and changes little when the table gains rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rankwise.data.row_template import RowTemplate, check_column
from rankwise.data.template import Message, Renderer, RenderError
from rankwise.data.training_table import open_table
from rankwise.data.values import Values
from rankwise.exceptions import DatasetError
from rankwise.reporter import SILENT, Advance, Reporter

if TYPE_CHECKING:
    from rankwise.assets.dataset import ResolvedData
    from rankwise.experiment.schema import DatasetSpec
    from rankwise.settings import Settings

MISSING = "empty cell"
NO_ANSWER = "no assistant turn"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of one row: its messages up to the last answer, or the reason why it is left out."""

    messages: tuple[Message, ...] = ()
    left_out: str | None = None
    unused_keys: frozenset[str] = frozenset()
    """Keys of the messages that have a value and are not `role` or `content`."""
    unanswered_tail: bool = False
    """Whether turns after the last answer were cut off."""


@dataclass(frozen=True, kw_only=True)
class RowMapping:
    """How a definition reads a table's rows. Parsed once, applied to every row."""

    messages: str | None
    prompt: RowTemplate | None
    completion: RowTemplate | None
    system: str | None
    values: Values

    @classmethod
    def of(cls, dataset: DatasetSpec, columns: Sequence[str], side: str) -> RowMapping:
        """Parse the `dataset` section for a table with `columns`. `side` names the table in messages.

        Raises:
            DatasetError: The section names neither form or both, a template is not valid, or a column does not exist.
        """
        where = "" if side == "train" else f" ({side} data)"
        values = Values.of(dataset)
        if dataset.messages is not None:
            if dataset.prompt is not None or dataset.completion is not None:
                raise DatasetError("dataset: give either messages, or prompt and completion, not both")
            check_column(dataset.messages, columns, f"dataset.messages{where}")
            return cls(messages=dataset.messages, prompt=None, completion=None, system=dataset.system, values=values)
        if dataset.prompt is None or dataset.completion is None:
            raise DatasetError(
                "dataset: rows need messages (a column of {role, content}), or both prompt and completion (templates "
                'over columns, such as "carat {carat}")'
            )
        prompt = RowTemplate.parse(dataset.prompt, f"dataset.prompt{where}", values)
        completion = RowTemplate.parse(dataset.completion, f"dataset.completion{where}", values)
        prompt.check(columns)
        completion.check(columns)
        return cls(messages=None, prompt=prompt, completion=completion, system=dataset.system, values=values)

    def convert(self, row: Mapping[str, Any], row_id: str) -> Conversion:
        """Make the conversation of one row, without the definition's system message (see `with_system`).

        Raises:
            DatasetError: A cell is not what the definition says it is.
        """
        if self.messages is None:
            return self._from_templates(row, row_id)
        cell = row[self.messages]
        if self.values.is_missing(cell):
            return Conversion(left_out=MISSING)
        messages, unused = parse_messages(cell, f"dataset.messages: row {row_id}, column {self.messages!r}")
        turns = answer_turns(messages)
        if not turns:
            return Conversion(left_out=NO_ANSWER, unused_keys=unused)
        kept = messages[: turns[-1] + 1]
        return Conversion(messages=kept, unused_keys=unused, unanswered_tail=len(kept) < len(messages))

    def _from_templates(self, row: Mapping[str, Any], row_id: str) -> Conversion:
        assert self.prompt is not None
        assert self.completion is not None
        if self.prompt.missing(row) is not None or self.completion.missing(row) is not None:
            return Conversion(left_out=MISSING)
        return Conversion(
            messages=(
                Message(role="user", content=self.prompt.render(row, row_id)),
                Message(role="assistant", content=self.completion.render(row, row_id)),
            )
        )

    def with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        """Put the definition's system message first, unless there is none or the row brings its own."""
        if self.system is None or messages[0]["role"] == "system":
            return messages
        return (Message(role="system", content=self.system), *messages)


def answer_turns(messages: Sequence[Message]) -> tuple[int, ...]:
    """Places of the assistant's turns that answer something.

    A greeting before anyone else spoke is context: most templates cannot render the empty conversation before it.
    """
    spoken = False
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            spoken = True
        elif spoken:
            turns.append(index)
    return tuple(turns)


def prompt_key(messages: Sequence[Message]) -> str:
    """A digest of everything before the last answer, for splits: equal prompts have equal keys.

    It does not depend on the base's chat template or on the definition's system message, so that definitions that
    differ in these evaluate on the same rows. White space is folded, since templates may strip it.
    """
    before = [
        [message["role"], " ".join(message["content"].split())] for message in messages[: answer_turns(messages)[-1]]
    ]
    return hashlib.sha256(json.dumps(before).encode()).hexdigest()


def parse_messages(cell: object, where: str) -> tuple[tuple[Message, ...], frozenset[str]]:
    """Check a cell with messages; a string is read as JSON. Also returns keys with a value that nothing uses.

    Raises:
        DatasetError: The cell is not a list of `{role, content}` with texts.
    """
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise DatasetError(f"{where}: the text is not JSON: {error}") from error
    if not isinstance(cell, list):
        raise DatasetError(f"{where}: expected a list of {{role, content}}, got {type(cell).__name__}")
    messages = []
    unused: set[str] = set()
    for number, each in enumerate(cell):
        place = f"{where}, message {number}"
        if not isinstance(each, dict):
            raise DatasetError(f"{place}: expected {{role, content}}, got {type(each).__name__} {each!r:.80}")
        role, content = each.get("role"), each.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            what = "role" if not isinstance(role, str) else "content"
            hint = "; rename from and value to role and content" if {"from", "value"} <= each.keys() else ""
            got = f"{type(each[what]).__name__} {each[what]!r:.80}" if what in each else f"only {', '.join(each)}"
            raise DatasetError(f"{place}: {what} must be a text, got {got}{hint}")
        unused.update(key for key, value in each.items() if key not in {"role", "content"} and value is not None)
        messages.append(Message(role=role, content=content))
    return tuple(messages), frozenset(unused)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Positions of rows on either side, in the table's order."""

    train: list[int]
    eval: list[int]
    left_out: list[int]
    """Rows of the last evaluation group beyond the wanted number: they belong to neither side."""


def split_groups(groups: Sequence[str], rows: int, seed: int) -> Split:
    """Choose `rows` evaluation rows so that no group lies on both sides.

    Groups are taken for evaluation in the order of `sha256(seed, group)` until they have at least `rows` rows. Of the
    last group only as many rows stay as are wanted, the first of the table; its others are left out. New rows elsewhere
    in the table change a group's side only where they come before it in that order.

    Args:
        groups: For each row of the table what must not lie on both sides, for example the prompt.
        rows: Number of evaluation rows.
        seed: Another seed gives another split.

    Raises:
        DatasetError: Nothing would be left to train on.
    """
    members: dict[str, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    taken: list[int] = []
    left_out: list[int] = []
    order = sorted(members, key=lambda group: _rank(seed, "group", group))
    used = 0
    while len(taken) < rows and used < len(order):
        block = members[order[used]]
        room = rows - len(taken)
        taken += block[:room]
        left_out += block[room:]
        used += 1
    if len(taken) < rows or used == len(order):
        raise DatasetError(
            f"dataset.eval: rows is {rows:,}, but the table has {len(groups):,} rows with {len(members):,} different "
            "prompts. Equal prompts must be on one side, so no rows would be left to train on; reduce rows, or provide "
            "a separate evaluation set"
        )
    outside = {*taken, *left_out}
    train = [position for position in range(len(groups)) if position not in outside]
    return Split(train=train, eval=sorted(taken), left_out=sorted(left_out))


def choose(ids: Sequence[str], limit: int | None, seed: int, side: str) -> list[int]:
    """Positions of at most `limit` rows, in the order given: those whose `sha256(seed, side, id)` is smallest.

    A larger limit keeps the rows of a smaller one.
    """
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    ranked = sorted(range(len(ids)), key=lambda position: _rank(seed, side, ids[position]))
    return sorted(ranked[:limit])


def _rank(seed: int, kind: Hashable, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\x00{kind}\x00{text}".encode()).digest()


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
    """Remarks on how the rows were read; preflight shows them as warnings."""


def load_examples(
    dataset: DatasetSpec,
    train: ResolvedData | None,
    eval: ResolvedData | None,
    renderer: Renderer,
    settings: Settings,
    progress: Reporter | None = None,
) -> Examples:
    """Read the definition's tables and make examples of their rows; see `build_examples`.

    Raises:
        AssetError: A table cannot be read.
        DatasetError: The rows do not fit the definition.
    """
    return build_examples(
        dataset,
        None if train is None else open_table(dataset, train, settings, progress),
        None if eval is None else open_table(dataset, eval, settings, progress),
        renderer,
        progress,
    )


def build_examples(
    dataset: DatasetSpec,
    train_table: Any | None,
    eval_table: Any | None,
    renderer: Renderer,
    progress: Reporter | None = None,
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
        progress: Reports finished rows.

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
            notes.append(f"{side}: {tails:,} rows have turns after the assistant's last one; these turns are not used")
        if not positions:
            why = ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items()) or "the table is empty"
            raise DatasetError(f"dataset.{side}: none of {len(row_ids):,} rows can be used: {why}")
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
