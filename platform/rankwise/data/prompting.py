"""How rows become prompts after training: as they did in training.

`Reading` is what a stored adapter keeps of its definition. `RowPrompts` makes the conversation of a row with it, for
`predict`, the Python API and pyfunc. Of a row, in this order:

1. a template that the caller gives (`--prompt`),
2. the template of training, if the row has its columns, and no `messages` or `prompt` that the template does not use,
3. the column that training read chats from, or `messages`; with the tools of the column that training read, or
   `tools`. The answer that a chat ends with is left out: it is what is asked for;
4. the column `prompt`, with a text or a chat; or the column `text` if there is no other, as of a `.txt` file.

A chat without a system message gets that of the definition, as in training. A text for an adapter that was trained on
documents (`format: text`) is the beginning of a document, which no chat template wraps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from rankwise.data.chat import Chat
from rankwise.data.formats import RowMapping
from rankwise.data.row_template import RowTemplate, check_column
from rankwise.data.tables import TEXT
from rankwise.data.values import ValueProblem, Values, is_null
from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import RENDERING, DatasetSpec

PROMPT, MESSAGES, TOOLS = "prompt", "messages", "tools"


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
    system_column: str | None = None
    na_values: tuple[str, ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: DatasetSpec, mapping: RowMapping | None = None) -> Reading:
        """The reading of a definition; `mapping` has what was recognized from its rows."""
        known = mapping or RowMapping(format="prompt_completion", messages=dataset.messages, tools=dataset.tools)
        return cls(
            rendering=dataset.rendering or RENDERING,
            format=dataset.format if mapping is None else mapping.format,
            prompt=dataset.prompt if known.prompt is None else known.prompt.source,
            completion=dataset.completion if known.completion is None else known.completion.source,
            messages=known.messages,
            tools=known.tools,
            system_column=known.system_column,
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

    @cached_property
    def _mapping(self) -> RowMapping:
        """How training read rows, without their columns."""
        reading = self.reading
        return RowMapping(
            format="messages",
            tools=None if reading.rendering == 1 else reading.tools or TOOLS,
            system_column=reading.system_column,
            # Releases up to 0.2 put it before plain texts only.
            system=None if reading.rendering == 1 else self.system,
            values=reading.values,
        )

    def fits(self, columns: Mapping[str, Any]) -> bool:
        """Whether the template of training makes the prompt of a row."""
        template = self._stored
        if template is None or not set(template.required) <= set(columns):
            return False
        given = {name for name in (PROMPT, MESSAGES) if not is_null(columns.get(name))}
        return given <= set(template.columns)

    def reads(self, columns: Mapping[str, Any]) -> bool:
        """Whether a row has what training made the prompt of: the columns of the template, or the column of chats."""
        chats = self.reading.messages
        return self.fits(columns) or (chats is not None and not is_null(columns.get(chats)))

    def chat(self, columns: Mapping[str, Any]) -> Chat:
        """The conversation of one row, up to what is asked.

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
                return self._ask(replace(self._mapping, messages=name), columns)
        name = TEXT if set(columns) == {TEXT} else PROMPT
        if name not in columns:
            raise DatasetError(self._what_is_missing(columns))
        return self._of_prompt(columns, name)

    def _rendered(self, template: RowTemplate, columns: Mapping[str, Any]) -> Chat:
        for column in template.required:
            check_column(column, columns, template.key)
        if self.reading.rendering == 1:
            return self.asked(template.render(columns, "of the input"))
        return self._ask(replace(self._mapping, prompt=template), columns)

    def _of_prompt(self, columns: Mapping[str, Any], name: str) -> Chat:
        prompt = columns[name]
        if self.reading.rendering == 1:
            if not isinstance(prompt, str):
                raise DatasetError(f"{PROMPT} must be a string, got {type(prompt).__name__} {prompt!r:.80}")
            return self.asked(prompt)
        if isinstance(prompt, list | tuple):
            return self._ask(replace(self._mapping, messages=name), columns)
        try:
            return self.asked(self.reading.values.text(prompt))
        except ValueProblem as problem:
            raise DatasetError(f"column {name!r} {problem}") from problem

    def _ask(self, mapping: RowMapping, columns: Mapping[str, Any]) -> Chat:
        return mapping.question(columns, "of the input")

    def asked(self, text: str) -> Chat:
        """The conversation of a plain text.

        Raises:
            DatasetError: It is empty.
        """
        if not text:
            raise DatasetError("the prompt is empty")
        chat = Chat(messages=({"role": "user", "content": text},), raw=self.reading.format == "text")
        return replace(self._mapping, system=self.system).with_system(chat)

    def conversation(self, messages: Any, tools: Any = None) -> Chat:
        """The conversation of a chat that is not in a row.

        Raises:
            DatasetError: It is not a chat, or an empty one.
        """
        columns = {MESSAGES: messages, TOOLS: tools}
        return self._ask(replace(self._mapping, messages=MESSAGES, tools=TOOLS), columns)

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
