"""What a row asks: its `messages`, its `prompt`, or a template over its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankwise.data.columns import RowTemplate, check_column
from rankwise.data.conversation import parse_messages
from rankwise.data.renderer import Message
from rankwise.exceptions import DatasetError

PROMPT, MESSAGES = "prompt", "messages"


@dataclass(frozen=True, kw_only=True)
class PromptReader:
    """Makes the conversation of a row.

    Attributes:
        template: Over columns; None to read the columns `messages` or `prompt`.
    """

    template: RowTemplate | None = None

    @classmethod
    def parse(cls, template: str | None) -> PromptReader:
        """Make a reader of `--prompt`.

        Raises:
            DatasetError: It is not a template.
        """
        return cls(template=None if template is None else RowTemplate.parse(template, "--prompt"))

    def chat(self, columns: Mapping[str, Any], system: str | None) -> list[Message]:
        """The conversation of one row.

        Args:
            columns: The row.
            system: The system prompt that the adapter was trained with, put before a bare text.

        Raises:
            DatasetError: It is no row, or has no prompt, or one that is not a text or a chat.
        """
        if not isinstance(columns, Mapping):
            raise DatasetError(f"a row must be a mapping of columns, got {type(columns).__name__}")
        if self.template is not None:
            for column in self.template.columns:
                check_column(column, columns, "--prompt")
            return _asked(self.template.render(columns, "of the input"), system)
        if columns.get(MESSAGES) is not None:
            messages, _ = parse_messages(columns[MESSAGES], MESSAGES)
            if not messages:
                raise DatasetError(f"{MESSAGES}: the chat is empty")
            return list(messages)
        if PROMPT not in columns:
            there = ", ".join(columns) or "none"
            raise DatasetError(
                f"there is neither a column {PROMPT!r} nor {MESSAGES!r}, and no --prompt; columns: {there}"
            )
        prompt = columns[PROMPT]
        if not isinstance(prompt, str):
            raise DatasetError(f"{PROMPT} must be a text, got {type(prompt).__name__} {prompt!r:.80}")
        return _asked(prompt, system)


def _asked(text: str, system: str | None) -> list[Message]:
    if not text:
        raise DatasetError("the prompt is empty")
    turn = Message(role="user", content=text)
    return [turn] if system is None else [Message(role="system", content=system), turn]
