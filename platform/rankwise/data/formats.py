"""What the columns of a table mean: recognizes the format, and makes a conversation (or a document) of a row.

| format | columns |
|---|---|
| `prompt_completion` | any, through the templates `dataset.prompt` and `dataset.completion`; or `prompt` and |
| | `completion`, texts or lists of messages |
| `messages` | `messages` (or `dataset.messages`): lists of `{role, content, ...}`; `tools` |
| `sharegpt` | `conversations`: lists of `{from, value}`; `system`, `tools` |
| `alpaca` | `instruction`, `output`; `input`, `system` |
| `text` | `text`, or any through the template `dataset.completion`: documents, without question and answer |

Without `dataset.format` the keys of the definition decide, then the names of the columns and the first rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rankwise.data.chat import Chat, Message, Tools, answer_turns, parse_messages, parse_tools, text_of
from rankwise.data.row_template import RowTemplate, check_column
from rankwise.data.values import CURRENT, Values
from rankwise.exceptions import DatasetError

if TYPE_CHECKING:
    from rankwise.experiment.schema import DatasetSpec

Format = Literal["prompt_completion", "messages", "sharegpt", "alpaca", "text"]
MISSING = "empty cell"
NO_ANSWER = "no assistant turn"
CHAT_COLUMNS = ("messages", "conversations", "conversation")
_ALPACA_PROMPT = "{instruction}[[\n\n{input}]]"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of one row: its conversation up to the last answer, or its document, or why it is left out."""

    chat: Chat | None = None
    document: str | None = None
    left_out: str | None = None
    unused_keys: frozenset[str] = frozenset()
    """Keys of the messages that have a value and that this version of the rendering does not use."""
    unanswered_tail: bool = False
    """Whether turns after the last answer were cut off."""


def recognize(dataset: DatasetSpec, columns: Sequence[str], rows: Sequence[Mapping[str, Any]] = ()) -> Format:
    """The format of a table: of the definition, else of its keys, else of the columns and the first rows.

    Raises:
        DatasetError: The columns are those of no format.
    """
    if dataset.format != "auto":
        return dataset.format
    if dataset.messages is not None:
        return _chat_format(dataset.messages, rows)
    if dataset.prompt is not None or dataset.completion is not None:
        return "prompt_completion"
    for name in CHAT_COLUMNS:
        if name in columns:
            return _chat_format(name, rows)
    if {"prompt", "completion"} <= set(columns):
        return "prompt_completion"
    if {"instruction", "output"} <= set(columns):
        return "alpaca"
    if set(columns) - {"id"} == {"text"}:
        return "text"
    raise DatasetError(
        f"dataset: the columns ({', '.join(columns) or 'none'}) are those of no known format. Set prompt and "
        'completion, templates over columns (such as "carat {carat}"), or messages, a column of {role, content}; or '
        "rename columns: messages; conversations (ShareGPT); prompt and completion; instruction, input and output "
        "(Alpaca); text (with format: text, for continued pretraining)"
    )


def _chat_format(column: str, rows: Sequence[Mapping[str, Any]]) -> Format:
    for row in rows:
        cell = row.get(column)
        if isinstance(cell, str):
            return "sharegpt" if '"from"' in cell else "messages"
        if isinstance(cell, list) and cell and isinstance(cell[0], Mapping):
            return "sharegpt" if cell[0].get("from") is not None and cell[0].get("role") is None else "messages"
    return "sharegpt" if column == "conversations" and rows else "messages"


@dataclass(frozen=True, kw_only=True)
class RowMapping:
    """How a definition reads a table's rows. Parsed once, applied to every row."""

    format: Format
    messages: str | None = None
    prompt: RowTemplate | None = None
    completion: RowTemplate | None = None
    document: RowTemplate | None = None
    tools: str | None = None
    system_column: str | None = None
    system: str | None = None
    values: Values = CURRENT

    @classmethod
    def of(
        cls,
        dataset: DatasetSpec,
        columns: Sequence[str],
        side: str,
        rows: Sequence[Mapping[str, Any]] = (),
    ) -> RowMapping:
        """Parse the `dataset` section for a table with `columns`.

        Args:
            dataset: The section.
            columns: Of the table.
            side: Names the table in messages.
            rows: The first of the table, to recognize its format.

        Raises:
            DatasetError: The columns are those of no format, the section names two forms, a template is not valid, or
                a column does not exist.
        """
        where = "" if side == "train" else f" ({side} data)"
        values = Values.of(dataset)
        if dataset.messages is not None and (dataset.prompt is not None or dataset.completion is not None):
            raise DatasetError("dataset: give either messages, or prompt and completion, not both")
        if (dataset.prompt is None) != (dataset.completion is None) and dataset.format != "text":
            raise DatasetError("dataset: give both prompt and completion (templates over columns), or neither")
        format = recognize(dataset, columns, rows)
        if dataset.tools is not None:
            check_column(dataset.tools, columns, f"dataset.tools{where}")
        tools = dataset.tools or ("tools" if "tools" in columns and values.version > 1 else None)
        system_column = "system" if "system" in columns and format in {"sharegpt", "alpaca"} else None
        if format == "text":
            _refuse(dataset, format, "prompt", "messages", "system", "tools")
            document = _template(dataset.completion or "{text}", f"dataset.completion{where}", columns, values)
            return cls(format=format, document=document, values=values)
        if format in {"messages", "sharegpt"}:
            _refuse(dataset, format, "prompt", "completion")
            column = dataset.messages or next((name for name in CHAT_COLUMNS if name in columns), CHAT_COLUMNS[0])
            check_column(column, columns, f"dataset.messages{where}")
            return cls(
                format=format,
                messages=column,
                tools=tools,
                system_column=system_column,
                system=dataset.system,
                values=values,
            )
        if format == "alpaca":
            _refuse(dataset, format, "messages")
            given = _ALPACA_PROMPT if "input" in columns else "{instruction}", "{output}"
        else:
            _refuse(dataset, format, "messages")
            given = "{prompt}", "{completion}"
        prompt = _template(dataset.prompt or given[0], f"dataset.prompt{where}", columns, values)
        completion = _template(dataset.completion or given[1], f"dataset.completion{where}", columns, values)
        return cls(
            format=format,
            prompt=prompt,
            completion=completion,
            tools=tools,
            system_column=system_column,
            system=dataset.system,
            values=values,
        )

    def reads_like(self, other: RowMapping) -> bool:
        """Whether both make the same of a row. Templates are compared without the key that they came from."""

        def unnamed(template: RowTemplate | None) -> RowTemplate | None:
            return None if template is None else replace(template, key="")

        def facts(mapping: RowMapping) -> RowMapping:
            return replace(mapping, prompt=unnamed(mapping.prompt), completion=unnamed(mapping.completion))

        return facts(self) == facts(other)

    def convert(self, row: Mapping[str, Any], row_id: str) -> Conversion:
        """Make the conversation of one row, without the definition's system message (see `with_system`).

        Raises:
            DatasetError: A cell is not what the definition says it is.
        """
        if self.document is not None:
            return self._document(row, row_id)
        if self.messages is not None:
            return self._conversation(row, row_id)
        return self._from_templates(row, row_id)

    def question(self, row: Mapping[str, Any], row_id: str) -> Chat:
        """What the last answer of a row answers. Answers need not be there.

        A conversation that ends with an answer is asked for that answer; one that does not, for the next.

        Raises:
            DatasetError: A cell is empty or not what the definition says it is, or a column is not there.
        """
        if self.messages is not None:
            check_column(self.messages, row, "messages")
            if self.values.is_missing(row[self.messages]):
                raise DatasetError(f"column {self.messages!r} has no value, and the prompt needs it")
            messages, _ = self._messages(row[self.messages], self.messages)
            tools = self._tools(row, row_id, chat=True)
        else:
            assert self.prompt is not None, "documents have no questions"
            for column in self.prompt.required:
                check_column(column, row, self.prompt.key)
            turns = self._turns(self.prompt, row, row_id, "user")
            if turns is None:
                raise DatasetError(f"column {self.prompt.missing(row)!r} has no value, and the prompt needs it")
            messages, tools = turns, self._tools(row, row_id, chat=self._is_list(self.prompt, row))
        if messages and messages[-1]["role"] == "assistant" and self.values.version > 1:
            messages = messages[:-1]
        if not messages:
            raise DatasetError(f"{self.messages or 'prompt'}: the chat is empty")
        if len(messages) == 1 and not text_of(messages[0]):
            raise DatasetError("the prompt is empty")
        return self.with_system(self._own_system(Chat(messages=messages, tools=tools), row))

    def with_system(self, chat: Chat) -> Chat:
        """Put the definition's system message first, unless there is none or the conversation brings its own."""
        return chat if self.system is None else _with_system(chat, self.system)

    def _document(self, row: Mapping[str, Any], row_id: str) -> Conversion:
        assert self.document is not None
        text = "" if self.document.missing(row) is not None else self.document.render(row, row_id)
        return Conversion(document=text) if text else Conversion(left_out=MISSING)

    def _conversation(self, row: Mapping[str, Any], row_id: str) -> Conversion:
        assert self.messages is not None
        cell = row[self.messages]
        if self.values.is_missing(cell):
            return Conversion(left_out=MISSING)
        messages, unused = self._messages(cell, f"dataset.messages: row {row_id}, column {self.messages!r}")
        turns = answer_turns(messages)
        if not turns:
            if self.values.version == 1:
                return Conversion(left_out=NO_ANSWER, unused_keys=unused)
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
            return Conversion(left_out=f"{NO_ANSWER} to a question (roles: {roles})")
        kept = messages[: turns[-1] + 1]
        chat = self._own_system(Chat(messages=kept, tools=self._tools(row, row_id, chat=True)), row)
        return Conversion(chat=chat, unused_keys=unused, unanswered_tail=len(kept) < len(messages))

    def _from_templates(self, row: Mapping[str, Any], row_id: str) -> Conversion:
        assert self.prompt is not None
        assert self.completion is not None
        asked = self._turns(self.prompt, row, row_id, "user")
        answered = self._turns(self.completion, row, row_id, "assistant")
        if asked is None or answered is None:
            return Conversion(left_out=MISSING)
        messages = (*asked, *answered)
        turns = [place for place in answer_turns(messages) if place >= len(asked)]
        if not turns:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages)) or "none"
            return Conversion(left_out=f"{NO_ANSWER} in the completion (roles: {roles})")
        listed = self._is_list(self.prompt, row) or self._is_list(self.completion, row)
        tools = self._tools(row, row_id, chat=listed)
        chat = self._own_system(Chat(messages=messages[: turns[-1] + 1], tools=tools, context=len(asked)), row)
        return Conversion(chat=chat, unanswered_tail=turns[-1] + 1 < len(messages))

    def _turns(
        self, template: RowTemplate, row: Mapping[str, Any], row_id: str, role: str
    ) -> tuple[Message, ...] | None:
        """What a template makes of a row: one turn, or the turns of a column of messages; None for an empty cell."""
        if template.missing(row) is not None:
            return None
        if self._is_list(template, row):
            (column,) = template.columns
            return parse_messages(row[column], f"{template.key}: row {row_id}, column {column!r}")
        return (Message(role=role, content=template.render(row, row_id)),)

    def _is_list(self, template: RowTemplate, row: Mapping[str, Any]) -> bool:
        column = template.whole_column
        return self.values.version > 1 and column is not None and isinstance(row.get(column), list | tuple)

    def _messages(self, cell: object, where: str) -> tuple[tuple[Message, ...], frozenset[str]]:
        if self.values.version > 1:
            return parse_messages(cell, where), frozenset()
        messages = parse_messages(cell, where, {})
        unused = {key for message in messages for key in message.keys() - {"role", "content"}}
        plain = tuple(Message(role=message["role"], content=message["content"] or "") for message in messages)
        return plain, frozenset(unused)

    def _tools(self, row: Mapping[str, Any], row_id: str, *, chat: bool) -> Tools | None:
        column = self.tools
        if column is None or not chat or self.values.is_missing(row.get(column)) or row[column] == "":
            return None
        return parse_tools(row[column], f"row {row_id}, column {column!r}")

    def _own_system(self, chat: Chat, row: Mapping[str, Any]) -> Chat:
        """Put the system message of the row's column first."""
        text = None if self.system_column is None else row.get(self.system_column)
        return _with_system(chat, text) if isinstance(text, str) and text else chat


def _with_system(chat: Chat, text: str) -> Chat:
    if chat.messages[0]["role"] == "system":
        return chat
    messages = (Message(role="system", content=text), *chat.messages)
    return replace(chat, messages=messages, context=chat.context + 1 if chat.context else 0)


def _template(text: str, key: str, columns: Sequence[str], values: Values) -> RowTemplate:
    template = RowTemplate.parse(text, key, values)
    template.check(columns)
    return template


def _refuse(dataset: DatasetSpec, format: Format, *keys: str) -> None:
    for key in keys:
        if getattr(dataset, key) is not None:
            raise DatasetError(f"dataset.{key}: cannot be combined with format: {format}; remove one of both")
