"""Rows of a table to conversations: a `messages` column, or `prompt` and `completion` templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.data.columns import RowTemplate, check_column, is_missing
from rankwise.data.renderer import Message
from rankwise.exceptions import DatasetError

if TYPE_CHECKING:
    from rankwise.experiment.schema import DatasetSpec

MISSING = "empty cell"
NO_ANSWER = "no assistant turn"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What became of one row: its messages, up to the last answer, or the reason why it is left out."""

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

    @classmethod
    def of(cls, dataset: DatasetSpec, columns: Sequence[str], side: str) -> RowMapping:
        """Parse the `dataset` section for a table with `columns`. `side` names the table in messages.

        Raises:
            DatasetError: The section names neither form or both, a template is not valid, or a column does not exist.
        """
        where = "" if side == "train" else f" ({side} data)"
        if dataset.messages is not None:
            if dataset.prompt is not None or dataset.completion is not None:
                raise DatasetError("dataset: give either messages, or prompt and completion, not both")
            check_column(dataset.messages, columns, f"dataset.messages{where}")
            return cls(messages=dataset.messages, prompt=None, completion=None, system=dataset.system)
        if dataset.prompt is None or dataset.completion is None:
            raise DatasetError(
                "dataset: rows need messages (a column of {role, content}), or both prompt and completion (templates "
                'over columns, such as "carat {carat}")'
            )
        prompt = RowTemplate.parse(dataset.prompt, f"dataset.prompt{where}")
        completion = RowTemplate.parse(dataset.completion, f"dataset.completion{where}")
        prompt.check(columns)
        completion.check(columns)
        return cls(messages=None, prompt=prompt, completion=completion, system=dataset.system)

    def convert(self, row: Mapping[str, Any], row_id: str) -> Conversion:
        """Make the conversation of one row, without the definition's system message (see `with_system`).

        Raises:
            DatasetError: A cell is not what the definition says it is.
        """
        if self.messages is None:
            return self._from_templates(row, row_id)
        cell = row[self.messages]
        if is_missing(cell):
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
        if any(is_missing(row[column]) for column in (*self.prompt.columns, *self.completion.columns)):
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
