"""How rows become prompts after training: as they did in training.

`Reading` is what a stored adapter keeps of its definition. `RowPrompts` makes the conversation of a row with it, for
`predict`, the Python API and pyfunc. Of a row, in this order:

1. a template that the caller gives (`--prompt`),
2. the template of training, if the row has its columns, and no `messages` or `prompt` that the template does not use,
3. the column `messages`, or the one that training read, with a chat,
4. the column `prompt`, with a text or a chat; or the column `text` if there is no other, as of a `.txt` file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

from rankwise.data.chat import Message, parse_messages
from rankwise.data.row_template import RowTemplate, check_column
from rankwise.data.tables import TEXT
from rankwise.data.values import ValueProblem, Values, is_null
from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import RENDERING, DatasetSpec

PROMPT, MESSAGES = "prompt", "messages"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows were read and rendered in training. The attributes are fields of `dataset`.

    `rendering` 1 without a template stands for adapters of releases up to 0.2, which stored nothing of this.
    """

    rendering: int = RENDERING
    format: str = "auto"
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    tools: str | None = None
    na_values: tuple[str, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: DatasetSpec) -> Reading:
        """The reading of a definition."""
        return cls(
            rendering=dataset.rendering or RENDERING,
            format=dataset.format,
            prompt=dataset.prompt,
            completion=dataset.completion,
            messages=dataset.messages,
            tools=dataset.tools,
            na_values=dataset.na_values,
            chat_template_kwargs=dict(dataset.chat_template_kwargs),
        )

    @property
    def values(self) -> Values:
        """How values become text."""
        return Values(version=self.rendering, na_values=self.na_values)

    def to_section(self) -> dict[str, Any]:
        """As plain values for YAML."""
        return {**asdict(self), "na_values": list(self.na_values)}

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> Reading:
        """The inverse of `to_section`.

        Raises:
            TypeError: A key is not known.
        """
        return cls(**{**section, "na_values": tuple(section["na_values"])})


FIRST_READING = Reading(rendering=1)


@dataclass(frozen=True, kw_only=True)
class RowPrompts:
    """Makes conversations of rows as in the training of one adapter.

    Attributes:
        reading: Of the adapter.
        system: The system message before a plain text; None for none.
        template: The caller's template, which replaces the adapter's; None for none.
    """

    reading: Reading
    system: str | None = None
    template: str | None = None

    def check(self) -> Self:
        """Return itself; raises DatasetError if the caller's template is not valid."""
        _ = self._own
        return self

    @cached_property
    def _own(self) -> RowTemplate | None:
        """The caller's template."""
        return None if self.template is None else RowTemplate.parse(self.template, "--prompt", self.reading.values)

    @cached_property
    def _stored(self) -> RowTemplate | None:
        """The template of training."""
        reading = self.reading
        if reading.prompt is None:
            return None
        return RowTemplate.parse(reading.prompt, "the stored prompt template", reading.values)

    @property
    def _chat_column(self) -> str:
        return self.reading.messages or MESSAGES

    def fits(self, columns: Mapping[str, Any]) -> bool:
        """Whether the template of training makes the prompt of a row."""
        template = self._stored
        if template is None or not set(template.columns) <= set(columns):
            return False
        given = {name for name in (PROMPT, MESSAGES) if not is_null(columns.get(name))}
        return given <= set(template.columns)

    def chat(self, columns: Mapping[str, Any]) -> list[Message]:
        """The conversation of one row.

        Raises:
            DatasetError: The row is not a mapping, or its prompt is missing or invalid.
        """
        if not isinstance(columns, Mapping):
            raise DatasetError(f"a row must be a mapping of columns, got {type(columns).__name__}")
        if self._own is not None:
            return self._rendered(self._own, columns)
        if self.fits(columns):
            assert self._stored is not None
            return self._rendered(self._stored, columns)
        for name in dict.fromkeys((self._chat_column, MESSAGES)):
            if not is_null(columns.get(name)):
                return _parsed(columns[name], name)
        name = TEXT if set(columns) == {TEXT} else PROMPT
        if name not in columns:
            raise DatasetError(self._what_is_missing(columns))
        return self._of_prompt(columns[name])

    def _rendered(self, template: RowTemplate, columns: Mapping[str, Any]) -> list[Message]:
        for column in template.columns:
            check_column(column, columns, template.key)
        if self.reading.rendering > 1 and (missing := template.missing(columns)) is not None:
            raise DatasetError(f"column {missing!r} has no value, and the prompt needs it")
        return self.asked(template.render(columns, "of the input"))

    def _of_prompt(self, prompt: Any) -> list[Message]:
        if self.reading.rendering == 1:
            if not isinstance(prompt, str):
                raise DatasetError(f"{PROMPT} must be a string, got {type(prompt).__name__} {prompt!r:.80}")
            return self.asked(prompt)
        if isinstance(prompt, list):
            return _parsed(prompt, PROMPT)
        try:
            return self.asked(self.reading.values.text(prompt))
        except ValueProblem as problem:
            raise DatasetError(f"column {PROMPT!r} {problem}") from problem

    def asked(self, text: str) -> list[Message]:
        """The conversation of a plain text.

        Raises:
            DatasetError: It is empty.
        """
        if not text:
            raise DatasetError("the prompt is empty")
        turn = Message(role="user", content=text)
        return [turn] if self.system is None else [Message(role="system", content=self.system), turn]

    def _what_is_missing(self, columns: Mapping[str, Any]) -> str:
        names = ", ".join(map(str, columns)) or "none"
        if self._stored is None:
            chat = self._chat_column
            return (
                f"the row has neither a column {PROMPT!r} nor {chat!r}, and --prompt is not set; its columns: {names}"
            )
        lacking = ", ".join(repr(name) for name in self._stored.columns if name not in columns)
        return (
            f"the row has no column {lacking} of the prompt template that the adapter was trained with "
            f"({self.reading.prompt!r:.80}), no {PROMPT!r} and no {MESSAGES!r}, and --prompt is not set; its columns: "
            f"{names}"
        )


def _parsed(cell: Any, name: str) -> list[Message]:
    messages = parse_messages(cell, name)
    if not messages:
        raise DatasetError(f"{name}: the chat is empty")
    return list(messages)
