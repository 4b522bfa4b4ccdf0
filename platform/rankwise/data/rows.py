"""Table rows to examples: of one or several sources, within splits and limits, and what was left out."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from rankwise.data.formats import Conversion, RowMapping
from rankwise.data.masks import Supervise, reference
from rankwise.data.selection import Pick, Split, choose, mix, split_groups, split_sources
from rankwise.data.spilled import Spilled, Texts
from rankwise.data.template import Renderer, RenderError
from rankwise.data.training_table import open_table
from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import EvalSplit
from rankwise.reporter import SILENT, Advance, Reporter

if TYPE_CHECKING:
    from rankwise.assets.dataset import ResolvedData
    from rankwise.experiment.schema import DatasetSpec
    from rankwise.settings import Settings


READ_ROWS = 1000
"""Rows read from a table at a time."""
SPILLED_ROWS = 100_000
"""The examples of more rows than these lie on the disk."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row as a conversation that ends with an answer, or as a document (no messages, an empty prompt)."""

    id: str
    """The row's `id` column, or its number in the source (from 0); of several sources `LABEL/ID`, and `#2` at its
    second copy."""
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
    source: str = ""
    """The label of the row's source; empty where there is only one."""

    @property
    def chat(self) -> Chat:
        """The conversation."""
        return Chat(messages=self.messages, tools=self.tools, context=self.context)


Side = Literal["train", "eval"]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Rows to train on and rows to evaluate on."""

    train: Sequence[Example]
    eval: Sequence[Example]
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out, by `SIDE: reason`."""
    notes: tuple[str, ...] = ()
    """Remarks on how the rows were read; preflight shows them as warnings."""
    mappings: Mapping[Side, Mapping[str, RowMapping]] = field(default_factory=dict)
    """How the rows of each side were read, by the label of the source; empty where there is only one."""

    @property
    def mapping(self) -> RowMapping | None:
        """How the training rows were read (or the evaluation rows, where these are all); None if sources differ."""
        first, *others = self._read
        return first if all(first.reads_like(other) for other in others) else None

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of the sources."""
        return tuple(dict.fromkeys(mapping.format for mapping in self._read))

    @property
    def _read(self) -> list[RowMapping]:
        return list((self.mappings["train"] or self.mappings["eval"]).values())

    def sources(self, side: Side) -> Mapping[str, RowMapping]:
        """How the rows of each of several sources were read, by their labels."""
        return {label: mapping for label, mapping in self.mappings[side].items() if label}


def load_examples(
    dataset: DatasetSpec,
    train: Sequence[ResolvedData] | None,
    eval: Sequence[ResolvedData] | None,
    renderer: Renderer,
    settings: Settings,
    progress: Reporter | None = None,
) -> Examples:
    """Read the tables of a definition's sources and make examples of their rows; see `build_examples`.

    Raises:
        AssetError: A table cannot be read.
        DatasetError: The rows do not fit the definition.
    """

    def tables(side: Side, resolved: Sequence[ResolvedData] | None) -> list[Any] | None:
        if resolved is None:
            return None
        parts = single_sources(dataset, side)
        return [open_table(part, data, settings, progress) for (_, part), data in zip(parts, resolved, strict=True)]

    scratch = settings.cache / "scratch"
    return build_examples(dataset, tables("train", train), tables("eval", eval), renderer, progress, scratch=scratch)


def single_sources(dataset: DatasetSpec, side: Side) -> list[tuple[str, DatasetSpec]]:
    """The label of each source of a side, empty where the definition has one, and the section for it alone."""
    given = dataset.train if side == "train" else dataset.eval
    if not isinstance(given, tuple):
        return [("", dataset)]
    return [(source.named, dataset.single(source, side)) for source in given]


def build_examples(
    dataset: DatasetSpec,
    train_tables: Sequence[Any] | None,
    eval_tables: Sequence[Any] | None,
    renderer: Renderer,
    progress: Reporter | None = None,
    *,
    scratch: Path | None = None,
) -> Examples:
    """Make examples of tables (`training_table.Table`), one for each source.

    With `dataset.eval` a split, `selection` takes the evaluation rows out of the training tables. Then `dataset.limit`
    and the weights of sources choose on each side, with the split's seed, or 0. Only what was chosen is rendered. Rows
    with an empty cell in a column that the templates use, and chats without an answer, are left out and counted.

    Args:
        dataset: The definition's section.
        train_tables: Rows to train on; None to make examples of `eval_tables` alone, where only these are needed.
        eval_tables: Rows to evaluate on; None where there are none, or where they are a split of the others.
        renderer: Makes texts of conversations.
        progress: Reports finished rows.
        scratch: Directory of the examples of long tables, which are not kept in memory (`SPILLED_ROWS`).

    Raises:
        DatasetError: The rows do not fit the definition, or the chat template refuses one.
    """
    split = dataset.eval if isinstance(dataset.eval, EvalSplit) and eval_tables is None else None
    notes: list[str] = []
    dropped: dict[str, int] = {}
    shown = progress or SILENT
    count = sum(len(table) for table in (*(train_tables or ()), *(eval_tables or ())))
    with shown.task("reading rows", count, "rows") as advance:

        def scan(side: Side, tables: Sequence[Any] | None) -> list[_Table]:
            # A group for every row takes memory: not without need.
            groups = _Groups() if side == "train" and split is not None else None
            parts = [] if tables is None else zip(single_sources(dataset, side), tables, strict=True)
            return [
                _Table.scan(table, part, side, label, groups, notes, dropped, advance) for (label, part), table in parts
            ]

        train, evaluation = scan("train", train_tables), scan("eval", eval_tables)
    _check_kinds([*train, *evaluation])
    seed = 0 if split is None else split.seed
    train_rows: list[Sequence[int]] = [range(len(table.ids)) for table in train]
    eval_rows: list[Sequence[int]]
    if split is not None:
        assert train, "a split needs the tables that it is taken from"
        sides = _split(train, split.rows, seed)
        if lost := sum(len(side.left_out) for side in sides):
            dropped["split: shares a prompt with evaluation rows"] = lost
        train_rows, eval_rows = [side.train for side in sides], [side.eval for side in sides]
        eval_source = train
    else:
        sources = zip(evaluation, dataset.eval_sources if evaluation else (), strict=True)
        eval_rows = [choose(table.ids, source.rows, seed, "eval") for table, source in sources]
        eval_source = evaluation
    train_picks = _mixed(dataset, train, train_rows, seed, notes)
    eval_picks = _limited(eval_source, eval_rows, dataset.limit.eval, seed, "eval", notes)
    with shown.task("rendering prompts", len(train_picks) + len(eval_picks), "rows") as advance:
        return Examples(
            train=_examples(train, train_picks, renderer, advance, scratch, generated=False),
            eval=_examples(eval_source, eval_picks, renderer, advance, scratch, generated=True),
            dropped=dropped,
            notes=tuple(notes),
            mappings={
                "train": {table.label: table.mapping for table in train},
                "eval": {table.label: table.mapping for table in eval_source},
            },
        )


def _check_kinds(tables: Sequence[_Table]) -> None:
    kinds = {table.mapping.document is None for table in tables}
    if len(kinds) > 1:
        formats = ", ".join(f"{table.label or 'data'}: {table.mapping.format}" for table in tables)
        raise DatasetError(
            f"dataset: documents (format: text) cannot be mixed with questions and answers ({formats}); train on them "
            "one after the other, with init_from"
        )


def _split(tables: Sequence[_Table], rows: int, seed: int) -> list[Split]:
    groups = [table.groups for table in tables]
    if len(tables) == 1:
        return [split_groups(groups[0], rows, seed)]
    return split_sources(groups, rows, seed, [table.label for table in tables])


def _mixed(
    dataset: DatasetSpec, tables: Sequence[_Table], rows: Sequence[Sequence[int]], seed: int, notes: list[str]
) -> list[Pick]:
    """The rows to train on; `rows` are those of each table that are not for evaluation."""
    limit = dataset.limit.train
    if isinstance(dataset.train, str) or not tables:
        return _limited(tables, rows, limit, seed, "train", notes)
    ids = [[table.ids[row] for row in own] for table, own in zip(tables, rows, strict=True)]
    picks = [replace(pick, position=rows[pick.source][pick.position]) for pick in mix(dataset.train, ids, limit, seed)]
    if limit is not None and limit > len(picks):
        notes.append(f"dataset.limit.train is {limit:,}, but there are only {len(picks):,} rows")
    counts = Counter(pick.source for pick in picks)
    for place, own in enumerate(rows):
        if (used := counts[place]) < len(own) and dataset.train[place].rows is None:
            notes.append(f"train: {tables[place].label}: {used:,} of {len(own):,} rows are in an epoch")
    return picks


def _limited(
    tables: Sequence[_Table],
    rows: Sequence[Sequence[int]],
    limit: int | None,
    seed: int,
    side: str,
    notes: list[str],
) -> list[Pick]:
    """At most `limit` of the rows of all tables."""
    count = sum(map(len, rows))
    if tables and limit is not None and limit > count:
        notes.append(f"dataset.limit.{side} is {limit:,}, but there are only {count:,} rows")
    if len(tables) == 1:
        (table,), (own,) = tables, rows
        return [Pick(0, own[place]) for place in choose([table.ids[row] for row in own], limit, seed, side)]
    picks = [Pick(place, row) for place, own in enumerate(rows) for row in own]
    names = [f"{pick.source}\x00{tables[pick.source].ids[pick.position]}" for pick in picks]
    return [picks[place] for place in choose(names, limit, seed, side)]


def _examples(
    tables: Sequence[_Table],
    picks: Sequence[Pick],
    renderer: Renderer,
    advance: Advance,
    scratch: Path | None,
    *,
    generated: bool,
) -> Sequence[Example]:
    """The examples of rows in the order of `picks`; copies of a row are rendered once."""
    if len(tables) == 1 and all(pick.copy == 1 for pick in picks):
        return tables[0].examples([pick.position for pick in picks], renderer, advance, scratch, generated=generated)
    examples: list[Example] = []
    for place, table in enumerate(tables):
        own = [pick for pick in picks if pick.source == place]
        rows = sorted({pick.position for pick in own})
        found = table.examples(rows, renderer, advance, scratch, generated=generated)
        made = dict(zip(rows, found, strict=True))
        for pick in own:
            example = made[pick.position]
            examples.append(example if pick.copy == 1 else replace(example, id=f"{example.id}#{pick.copy}"))
        advance(len(own) - len(rows))
    return examples


@dataclass(frozen=True, kw_only=True)
class _Table:
    """The usable rows of a table: where each lies, its id and its group. The rows themselves are read when chosen."""

    table: Any
    label: str
    mapping: RowMapping
    positions: Sequence[int]
    ids: list[str]
    keys: list[str]
    all_groups: _Groups | None

    @property
    def groups(self) -> list[str]:
        """The group of each row, with a split. It is known once all sources of the side are scanned."""
        assert self.all_groups is not None
        return self.all_groups.names(self.keys)

    def named(self, row: int) -> str:
        """The id of a row among those of all sources."""
        return f"{self.label}/{self.ids[row]}" if self.label else self.ids[row]

    @classmethod
    def scan(
        cls,
        table: Any,
        dataset: DatasetSpec,
        side: Side,
        label: str,
        groups: _Groups | None,
        notes: list[str],
        dropped: dict[str, int],
        advance: Advance,
    ) -> _Table:
        where = f"{side}: {label}" if label else side
        mapping = RowMapping.of(dataset, table.column_names, f"{side} {label}" if label else side, first_rows(table))
        row_ids = _row_ids(table, where, notes)
        prefix = f"{label}/" if label else ""
        positions = array("q")
        ids: list[str] = []
        keys: list[str] = []
        reasons: Counter[str] = Counter()
        unused: Counter[str] = Counter()
        unknown = _UnknownRoles()
        tails = 0
        for position, row in _iterate(table):
            if position % READ_ROWS == 0:
                advance(min(READ_ROWS, len(table) - position))
            try:
                conversion = mapping.convert(row, prefix + row_ids[position])
            except UnknownRoleError as error:
                unknown.add(error, prefix + row_ids[position])
                continue
            unused.update(conversion.unused_keys)
            tails += conversion.unanswered_tail
            if conversion.left_out is not None:
                reasons[conversion.left_out] += 1
                continue
            positions.append(position)
            ids.append(row_ids[position])
            if groups is not None:
                own = _keys(conversion, dataset.supervise if mapping.values.version > 1 else "last_answer")
                groups.add(own)
                keys.append(own[0])
        unknown.check(f"dataset.{where}", mapping.messages)
        dropped.update({f"{where}: {reason}": count for reason, count in reasons.items()})
        for key, count in unused.items():
            notes.append(f"{where}: messages of {count:,} rows have a key {key!r}, which is not used")
        if tails:
            notes.append(f"{where}: {tails:,} rows have turns after the assistant's last one; these turns are not used")
        if not positions:
            why = ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items()) or "the table is empty"
            raise DatasetError(f"dataset.{where}: none of {len(row_ids):,} rows can be used: {why}")
        return cls(
            table=table, label=label, mapping=mapping, positions=positions, ids=ids, keys=keys, all_groups=groups
        )

    def examples(
        self, rows: Sequence[int], renderer: Renderer, advance: Advance, scratch: Path | None, *, generated: bool
    ) -> Sequence[Example]:
        """The examples of rows; `generated`: their completions are what generation writes, thoughts and calls too."""
        examples: list[Example] = []
        spilled: Spilled[Example] | None = None
        if len(rows) > SPILLED_ROWS:
            spilled = Spilled(lambda first, texts: self._examples(rows[first : first + len(texts)], texts), scratch)
        for first in range(0, len(rows), READ_ROWS):
            block = rows[first : first + READ_ROWS]
            texts = self._texts(block, renderer, generated)
            if spilled is None:
                examples += self._examples(block, texts)
            else:
                spilled.append(texts)
            advance(len(block))
        return examples if spilled is None else spilled

    def _read(self, rows: Sequence[int]) -> list[tuple[str, dict[str, Any], Conversion]]:
        """The id of each row, its cells, and what they become."""
        picked = self.table.select([self.positions[row] for row in rows])
        cells = [cells for _, cells in _iterate(picked)]
        ids = [self.named(row) for row in rows]
        return [(row_id, row, self.mapping.convert(row, row_id)) for row_id, row in zip(ids, cells, strict=True)]

    def _chat(self, conversion: Conversion) -> Chat:
        assert conversion.chat is not None, "rows without one are left out"
        return self.mapping.with_system(conversion.chat)

    def _texts(self, rows: Sequence[int], renderer: Renderer, generated: bool) -> Texts:
        """The prompt and the completion of each row."""
        read = self._read(rows)
        if self.mapping.document is not None:
            return [["", conversion.document or ""] for _, _, conversion in read]
        chats = [self._chat(conversion) for _, _, conversion in read]
        try:
            prompts = renderer.texts(
                [chat.messages[: chat.answers[-1]] for chat in chats],
                tools=[chat.tools for chat in chats],
                add_generation_prompt=True,
            )
        except RenderError as error:
            raise DatasetError(f"Row {read[error.index][0]}: {error}") from error
        return [
            [prompt, reference(chat, row_id, renderer, prompt) if generated else text_of(chat.messages[-1])]
            for (row_id, _, _), chat, prompt in zip(read, chats, prompts, strict=True)
        ]

    def _examples(self, rows: Sequence[int], texts: Texts) -> list[Example]:
        examples = []
        for (row_id, row, conversion), (prompt, completion) in zip(self._read(rows), texts, strict=True):
            chat = None if self.mapping.document is not None else self._chat(conversion)
            examples.append(
                Example(
                    id=row_id,
                    messages=() if chat is None else chat.messages,
                    prompt=prompt,
                    completion=completion,
                    tools=None if chat is None else chat.tools,
                    context=0 if chat is None else chat.context,
                    columns=row,
                    source=self.label,
                )
            )
        return examples


def _keys(conversion: Conversion, supervise: Supervise) -> list[str]:
    if conversion.chat is None:
        return [document_key(conversion.document or "")]
    return answer_keys(conversion.chat, supervise)


def answer_keys(chat: Chat, supervise: Supervise) -> list[str]:
    """The keys of what comes before each answer that is learned; see `chat.prompt_key`."""
    places = chat.answers[-1:] if supervise == "last_answer" else chat.answers
    return [key_before(chat.messages, place, chat.tools) for place in places]


def document_key(text: str) -> str:
    """A digest of a document, white space folded."""
    return hashlib.sha256(("document\x00" + " ".join(text.split())).encode()).hexdigest()


def row_keys(example: Example, systems: Collection[str] = (), supervise: Supervise = "answers") -> list[str]:
    """The keys of an example's answers; `systems` are the definition's own system messages, which do not count."""
    if not example.messages:
        return [document_key(example.completion)]
    chat = example.chat
    if chat.messages[0]["role"] == "system" and chat.messages[0]["content"] in systems:
        chat = replace(chat, messages=chat.messages[1:], context=max(0, chat.context - 1))
    return answer_keys(chat, supervise)


class _Groups:
    """Rows that must be on one side of a split: those with a key in common, directly or through others."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def add(self, keys: Sequence[str]) -> None:
        roots = {self._root(key) for key in keys}
        # The smallest key names a group, whatever the order of the rows.
        first = min(roots)
        self._parents.update(dict.fromkeys(roots, first))

    def names(self, keys: Sequence[str]) -> list[str]:
        """The group of each key."""
        return [self._root(key) for key in keys]

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
