"""Table rows to examples: the train/eval split, limits, and what was left out.

Split and limits order rows by a SHA-256 of the seed and of the row, not by a random generator, so the choice is the
same on every machine and changes little when the table gains rows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.data.chat import (
    CALL_ROLES,
    KNOWN_ROLES,
    ROLES,
    Chat,
    Message,
    Tools,
    UnknownRoleError,
    key_before,
    text_of,
)
from rankwise.data.formats import RowMapping
from rankwise.data.masks import Supervise, reference
from rankwise.data.spilled import Spilled
from rankwise.data.template import Renderer, RenderError
from rankwise.data.training_table import open_table
from rankwise.exceptions import DatasetError
from rankwise.reporter import SILENT, Advance, Reporter

if TYPE_CHECKING:
    from rankwise.assets.dataset import ResolvedData
    from rankwise.experiment.schema import DatasetSpec
    from rankwise.settings import Settings


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
SPILLED_ROWS = 100_000
"""The examples of more rows than these lie on the disk."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row as a conversation that ends with an answer, or as a document (no messages, an empty prompt)."""

    id: str
    """The row's `id` column, or its number in the source (from 0)."""
    messages: tuple[Message, ...]
    prompt: str
    """Rendered text up to where the last answer begins, with the generation prompt."""
    completion: str
    """The assistant's last answer; of an evaluation row as generation writes it. Of a document: its text."""
    tools: Tools | None = None
    """What the conversation may call."""
    context: int = 0
    """The first messages, whose answers are read and not learned."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row as it was, for metrics."""

    @property
    def chat(self) -> Chat:
        """The conversation."""
        return Chat(messages=self.messages, tools=self.tools, context=self.context)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows to train on and rows to evaluate on."""

    train: Sequence[Example]
    eval: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by `SIDE: reason`."""
    notes: tuple[str, ...] = ()
    """Remarks on how the rows were read; preflight shows them as warnings."""
    mapping: RowMapping | None = None
    """How the training rows were read (or the evaluation rows, where these are all)."""


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
        scratch=settings.cache / "scratch",
    )


def build_examples(
    dataset: DatasetSpec,
    train_table: Any | None,
    eval_table: Any | None,
    renderer: Renderer,
    progress: Reporter | None = None,
    *,
    scratch: Path | None = None,
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
        scratch: Directory of the examples of long tables, which are not kept in memory (`SPILLED_ROWS`).

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
            train=[] if train is None else train.examples(train_rows, renderer, advance, scratch, generated=False),
            eval=(
                []
                if eval_source is None
                else eval_source.examples(eval_rows, renderer, advance, scratch, generated=True)
            ),
            dropped=dropped,
            notes=tuple(notes),
            mapping=None if (table := train or eval_source) is None else table.mapping,
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
        mapping = RowMapping.of(dataset, table.column_names, side, first_rows(table))
        row_ids = _row_ids(table, side, notes)
        positions, ids = [], []
        groups = _Groups()
        reasons: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        unknown = _UnknownRoles()
        tails = 0
        for position, row in _iterate(table):
            if position % READ_ROWS == 0:
                advance(min(READ_ROWS, len(table) - position))
            try:
                conversion = mapping.convert(row, row_ids[position])
            except UnknownRoleError as error:
                unknown.add(error, row_ids[position])
                continue
            unused.update(conversion.unused_keys)
            tails += conversion.unanswered_tail
            if conversion.left_out is not None:
                reasons[conversion.left_out] += 1
                continue
            positions.append(position)
            ids.append(row_ids[position])
            if conversion.chat is None:
                groups.add([document_key(conversion.document or "")])
            else:
                groups.add(
                    answer_keys(conversion.chat, "last_answer" if mapping.values.version == 1 else dataset.supervise)
                )
        unknown.check(f"dataset.{side}", mapping.messages)
        dropped.update({f"{side}: {reason}": count for reason, count in reasons.items()})
        for key, count in unused.items():
            notes.append(f"{side}: messages of {count:,} rows have a key {key!r}, which is not used")
        if tails:
            notes.append(f"{side}: {tails:,} rows have turns after the assistant's last one; these turns are not used")
        if not positions:
            why = ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items()) or "the table is empty"
            raise DatasetError(f"dataset.{side}: none of {len(row_ids):,} rows can be used: {why}")
        return cls(table=table, mapping=mapping, positions=positions, ids=ids, groups=groups.names())

    def examples(
        self, rows: Sequence[int], renderer: Renderer, advance: Advance, scratch: Path | None, *, generated: bool
    ) -> Sequence[Example]:
        """The examples of rows; `generated`: their completions are what generation writes, thoughts and calls too."""
        examples: list[Example] = []
        spilled: Spilled[Example] | None = Spilled(scratch) if len(rows) > SPILLED_ROWS else None
        for first in range(0, len(rows), READ_ROWS):
            block = rows[first : first + READ_ROWS]
            picked = self.table.select([self.positions[row] for row in block])
            cells = [row for _, row in _iterate(picked)]
            made = self._examples([self.ids[row] for row in block], cells, renderer, generated)
            if spilled is None:
                examples += made
            else:
                spilled.append(made)
            advance(len(block))
        return examples if spilled is None else spilled

    def _examples(
        self, ids: list[str], cells: list[dict[str, Any]], renderer: Renderer, generated: bool
    ) -> list[Example]:
        conversions = [self.mapping.convert(row, row_id) for row, row_id in zip(cells, ids, strict=True)]
        if self.mapping.document is not None:
            return [
                Example(id=row_id, messages=(), prompt="", completion=conversion.document or "", columns=row)
                for row_id, row, conversion in zip(ids, cells, conversions, strict=True)
            ]
        chats = [self.mapping.with_system(conversion.chat) for conversion in conversions if conversion.chat is not None]
        try:
            prompts = renderer.texts(
                [chat.messages[: chat.answers[-1]] for chat in chats],
                tools=[chat.tools for chat in chats],
                add_generation_prompt=True,
            )
        except RenderError as error:
            raise DatasetError(f"Row {ids[error.index]}: {error}") from error
        return [
            Example(
                id=row_id,
                messages=chat.messages,
                prompt=prompt,
                completion=reference(chat, row_id, renderer, prompt) if generated else text_of(chat.messages[-1]),
                tools=chat.tools,
                context=chat.context,
                columns=row,
            )
            for row_id, row, chat, prompt in zip(ids, cells, chats, prompts, strict=True)
        ]


def answer_keys(chat: Chat, supervise: Supervise) -> list[str]:
    """The keys of what comes before each answer that is learned; see `chat.prompt_key`."""
    places = chat.answers[-1:] if supervise == "last_answer" else chat.answers
    return [key_before(chat.messages, place, chat.tools) for place in places]


def document_key(text: str) -> str:
    """A digest of a document, white space folded."""
    return hashlib.sha256(("document\x00" + " ".join(text.split())).encode()).hexdigest()


def row_keys(example: Example, system: str | None, supervise: Supervise = "answers") -> list[str]:
    """The keys of an example's answers; `system` is the definition's own system message, which does not count."""
    if not example.messages:
        return [document_key(example.completion)]
    chat = example.chat
    if chat.messages[0]["role"] == "system" and chat.messages[0]["content"] == system:
        chat = replace(chat, messages=chat.messages[1:], context=max(0, chat.context - 1))
    return answer_keys(chat, supervise)


class _Groups:
    """Rows that must be on one side of a split: those with a key in common, directly or through others."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}
        self._rows: list[str] = []

    def add(self, keys: Sequence[str]) -> None:
        roots = {self._root(key) for key in keys}
        # The smallest key names a group, whatever the order of the rows.
        first = min(roots)
        self._parents.update(dict.fromkeys(roots, first))
        self._rows.append(keys[0])

    def names(self) -> list[str]:
        return [self._root(key) for key in self._rows]

    def _root(self, key: str) -> str:
        path = []
        while (parent := self._parents.setdefault(key, key)) != key:
            path.append(key)
            key = parent
        self._parents.update(dict.fromkeys(path, key))
        return key


class _UnknownRoles:
    """Roles that no chat template has, and the keys of the messages that have them."""

    def __init__(self) -> None:
        self._roles: Counter[str] = Counter()
        self._keys: dict[str, None] = {}
        self._first: str | None = None

    def add(self, error: UnknownRoleError, row_id: str) -> None:
        self._roles[error.role] += 1
        self._keys.update(dict.fromkeys(error.keys))
        self._first = row_id if self._first is None else self._first

    def check(self, side: str, column: str | None) -> None:
        if not self._roles:
            return
        roles = ", ".join(f"{role!r} ({count:,} rows)" for role, count in self._roles.items())
        known = ", ".join([*ROLES, *CALL_ROLES, *KNOWN_ROLES])
        raise DatasetError(
            f"{side}: messages in the column {column!r} have the keys {', '.join(self._keys)} and roles that are not "
            f"known: {roles}, the first in row {self._first}; known roles are {known}. Rename these roles"
        )


def first_rows(table: Any, count: int = 100) -> list[dict[str, Any]]:
    """The first rows of a table, to recognize its format."""
    return [row for _, row in islice(_iterate(table), count)]


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
