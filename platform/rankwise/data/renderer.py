"""Conversations to text to tokens, as transformers does it: its sandboxed chat template, then its tokenizer."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from rankwise.data.template import apply_template, end_token_ids, padding_id, tokenizer_digest
from rankwise.exceptions import DatasetError


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


Conversation = Sequence[Message]


class RenderError(DatasetError):
    """Raised when the chat template refuses a conversation. `index` is its place in the batch."""

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[type[RenderError], tuple[str, int]]:
        return type(self), (self.message, self.index)


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """A tokenizer with the chat template to use, and the tokens at which generation stops."""

    tokenizer: Any
    end_token_ids: frozenset[int]

    @classmethod
    def create(
        cls,
        tokenizer: Any,
        chat_template: str | None = None,
        *,
        base: Path | None = None,
        template_revision: str | None = None,
    ) -> Renderer:
        """Make a renderer.

        Args:
            tokenizer: The base's tokenizer; it stays as it is.
            chat_template: As `dataset.chat_template`: None for the base's own, `chatml`, `plain`, a Jinja file.
            base: The base's directory, whose generation configuration may name more end tokens.
            template_revision: As `dataset.chat_template_revision`: the pin of a Jinja file.

        Raises:
            DatasetError: See `apply_template` and `end_token_ids`.
        """
        return cls(
            tokenizer=apply_template(tokenizer, chat_template, template_revision),
            end_token_ids=end_token_ids(tokenizer, base),
        )

    @property
    def template(self) -> str:
        """The text of the chat template."""
        return str(self.tokenizer.chat_template)

    @property
    def dated(self) -> bool:
        """Whether the template writes the current date, so that the same rows give other tokens tomorrow."""
        return "strftime_now" in self.template

    @property
    def pad_token_id(self) -> int:
        """The token to fill batches with."""
        return padding_id(self.tokenizer)

    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self.tokenizer)

    def digest(self) -> str:
        """SHA-256 over everything that decides the tokens of a conversation."""
        parts: list[object] = [self._tokenizer_digest, self.template, sorted(self.end_token_ids)]
        if self.dated:
            parts.append(datetime.datetime.now(tz=datetime.UTC).astimezone().date().isoformat())
        return "sha256:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def texts(self, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False) -> list[str]:
        """Render conversations; with `add_generation_prompt` up to where an assistant's answer begins.

        Raises:
            RenderError: The template refuses one of them.
        """
        rendered = []
        for index, conversation in enumerate(conversations):
            rendered.append(self._text(conversation, index, add_generation_prompt))
        return rendered

    def _text(self, conversation: Conversation, index: int, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in conversation],
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in conversation)
            raise RenderError(
                f"The chat template refuses a conversation with the roles {roles}: {error}; change dataset.system or "
                "the rows, or set dataset.chat_template",
                index,
            ) from error

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts, without further special tokens: the template has written them."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about model_max_length: the definition's max_length decides
        )
        return [list(ids) for ids in encoded["input_ids"]]
