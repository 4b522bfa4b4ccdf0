"""Chat templates (the base's own, built-in, or a Jinja file): checks against hostile ones, rendering, end tokens.

- `chatml`: a turn is `<|im_start|>ROLE`, a newline, the content, `<|im_end|>`, a newline. For a tokenizer that knows
  both marks and stops at the second.
- `plain`: prompt, newline, answer, the tokenizer's end token; no marks. For any tokenizer; the fewest tokens, so that
  short prompts stay short.

`plain` in full: an assistant's turn is its content and the end token, any other turn its content and a newline (a
system turn without content is left out), nothing more. The newline between prompt and answer keeps the tokens of the
prompt the same with and without the answer: tokenizers split after a newline, while a space would join the first word.
Both begin with the tokenizer's first token (`bos_token`) where the tokenizer itself begins a text with it.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rankwise.data.capabilities import PROBLEMS, Capabilities, probe
from rankwise.data.chat import Chat, Message, Tools, text_of
from rankwise.data.template_guard import TemplateRefused, guard
from rankwise.digests import content_digest
from rankwise.exceptions import DatasetError

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
        "{% elif message['content'] or message['role'] != 'system' %}{{ message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}"
    ),
}


def apply_template(tokenizer: Any, chat_template: str | None, revision: str | None = None) -> Any:
    """Return a copy of the tokenizer whose `chat_template` is the one to use; the given tokenizer stays as it is.

    Args:
        tokenizer: A transformers tokenizer.
        chat_template: None for the base's own, `chatml`, `plain`, the path of a Jinja file, or the text of a template
            (what has `{{` or `{%` in it), as a resolved definition records it.
        revision: The pin of a file, `sha256:...`; None to take it as it is.

    Raises:
        DatasetError: The base has no template and none is given, the file cannot be read or is not what its pin says,
            the template is not valid Jinja or could exhaust time or memory, or a built-in one does not fit the
            tokenizer.
    """
    result = copy.copy(tokenizer)
    result.chat_template = template_text(tokenizer, chat_template, revision)
    return result


def is_template_file(chat_template: str) -> bool:
    """Whether `dataset.chat_template` names a file: neither built in nor the text of a template."""
    return chat_template not in BUILT_IN and "{{" not in chat_template and "{%" not in chat_template


def template_text(tokenizer: Any, chat_template: str | None, revision: str | None = None) -> str:
    """The text of the template that `apply_template` sets; same arguments and errors."""
    if chat_template is None:
        return _own(tokenizer)
    if chat_template in BUILT_IN:
        return _built_in(tokenizer, chat_template)
    if not is_template_file(chat_template):
        return _checked(tokenizer, chat_template, "dataset.chat_template")
    path = Path(chat_template).expanduser()
    if not path.suffix and not path.exists():
        raise DatasetError(
            f"dataset.chat_template: {chat_template!r} is neither built in nor a file; allowed are "
            f"{', '.join(BUILT_IN)}, the path of a Jinja file, or null for the base's own template"
        )
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DatasetError(
            f"dataset.chat_template: cannot read {path.absolute()}: {reason}; allowed are {', '.join(BUILT_IN)}, the "
            "path of a Jinja file, or null for the base's own template"
        ) from error
    digest = content_digest(content)
    if revision not in {None, digest}:
        raise DatasetError(
            f"dataset.chat_template: {path.absolute()} has the digest {digest}, but chat_template_revision is "
            f"{revision}; restore the original file, or update the revision"
        )
    return _checked(tokenizer, text, f"dataset.chat_template: {path}")


def _own(tokenizer: Any) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):  # some bases carry several, of which transformers renders plain chats with this one
        own = own.get("default")
    if not own:
        name = f" {tokenizer.name_or_path}" if tokenizer.name_or_path else ""
        raise DatasetError(
            f"The base{name} has no chat template; set dataset.chat_template to plain (prompt, newline, answer, end "
            "token), chatml (for a tokenizer that knows <|im_start|> and <|im_end|>), or the path of a Jinja file; it "
            "is stored with the adapter"
        )
    return _checked(tokenizer, str(own), "the base's chat template")


def _built_in(tokenizer: Any, name: str) -> str:
    if tokenizer.eos_token is None:
        raise DatasetError(
            f"dataset.chat_template: {name} needs an end token, but the base's tokenizer has no eos_token; use a "
            "Jinja file that ends an assistant's turn with a token of the generation configuration's eos_token_id"
        )
    if name == "chatml":
        known = set(tokenizer.get_vocab())
        absent = [mark for mark in ("<|im_start|>", "<|im_end|>") if mark not in known]
        if absent or tokenizer.eos_token != "<|im_end|>":
            why = f"it does not know {', '.join(absent)}" if absent else f"its end token is {tokenizer.eos_token!r}"
            raise DatasetError(
                f"dataset.chat_template: chatml does not fit this base's tokenizer: {why}, so generation would not "
                "stop at <|im_end|>; use plain, or a Jinja file"
            )
    return ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + BUILT_IN[name]


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself begins a text with its first token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _checked(tokenizer: Any, text: str, where: str) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        guard(text)
    except TemplateRefused as error:
        raise DatasetError(
            f"{where}: refused, because it could exhaust time or memory: {error}; a chat template needs no more than "
            "one loop over the messages"
        ) from error
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template=text, tokenize=False)
    except TemplateSyntaxError as error:
        raise DatasetError(f"{where}: line {error.lineno}: not a valid Jinja template: {error.message}") from error
    except (TemplateError, TypeError, ValueError, KeyError):
        # It parses; what it refuses depends on the messages, and is reported with the rows that it refuses.
        return text
    return text


def end_token_ids(tokenizer: Any, base: Path | None = None) -> frozenset[int]:
    """The tokens that make generation stop: the tokenizer's `eos_token` and those of the generation configuration.

    Args:
        tokenizer: A transformers tokenizer.
        base: The base's directory, whose `generation_config.json` (or else `config.json`) is read; without it only the
            tokenizer counts.

    Raises:
        DatasetError: One of the files is not JSON, or its `eos_token_id` is not made of numbers.
    """
    tokens = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    for name in () if base is None else ("generation_config.json", "config.json"):
        assert base is not None
        path = base / name
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            tokens.update(int(token) for token in (value if isinstance(value, list) else [value]) if token is not None)
        except (ValueError, TypeError, AttributeError) as error:
            raise DatasetError(f"{path}: eos_token_id cannot be read: {error}") from error
        break  # transformers takes the end tokens from config.json only where there is no generation configuration
    return frozenset(tokens)


def padding_id(tokenizer: Any) -> int:
    """The token that fills a batch: `pad_token`, or else `eos_token`, or else 0. It is always masked out."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return int(value)
    return 0


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (`sha256:...`) over what decides the tokens of a text: the tokenizer's model, rules and special tokens.

    Raises:
        DatasetError: The tokenizer is not one of the `tokenizers` library, whose state cannot be read as a text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DatasetError(
            f"The base's tokenizer ({type(tokenizer).__name__}) is not a fast one; rankwise needs a base with a "
            "tokenizer.json, or one that transformers can convert to it"
        )
    state = json.loads(backend.to_str())
    # Calls with padding=True leave these behind; they do not change the tokens of a text.
    state.pop("padding", None)
    state.pop("truncation", None)
    text = json.dumps([state, {k: str(v) for k, v in tokenizer.special_tokens_map.items()}], sort_keys=True)
    return content_digest(text.encode())


Conversation = Sequence[Message]

RESERVED = frozenset(
    {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "max_length",
     "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize",
     "tokenizer_kwargs", "tools", "truncation"}
)  # fmt: skip
"""What `apply_chat_template` takes itself; never variables of a template."""


class RenderError(DatasetError):
    """Raised when the chat template refuses a conversation. `index` is its place in the batch."""

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index

    def __reduce__(self) -> tuple[type[RenderError], tuple[str, int]]:
        return type(self), (self.message, self.index)


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """A tokenizer with the chat template to use and its arguments, and the tokens at which generation stops."""

    tokenizer: Any
    end_token_ids: frozenset[int]
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """As `dataset.chat_template_kwargs`: variables for the template."""

    @classmethod
    def create(
        cls,
        tokenizer: Any,
        chat_template: str | None = None,
        *,
        base: Path | None = None,
        template_revision: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        required: bool = True,
    ) -> Renderer:
        """Make a renderer.

        Args:
            tokenizer: The base's tokenizer; it stays as it is.
            chat_template: As `dataset.chat_template`: None for the base's own, `chatml`, `plain`, a Jinja file.
            base: The base's directory, whose generation configuration may name more end tokens.
            template_revision: As `dataset.chat_template_revision`: the pin of a Jinja file.
            chat_template_kwargs: As `dataset.chat_template_kwargs`.
            required: Whether there must be a chat template now. Without it, one is missed when a chat is rendered.

        Raises:
            DatasetError: See `apply_template` and `end_token_ids`; or an argument has a name that cannot be one.
        """
        reserved = sorted(RESERVED & set(chat_template_kwargs or {}))
        if reserved:
            raise DatasetError(
                f"dataset.chat_template_kwargs: {', '.join(reserved)} cannot be set; allowed are variables that the "
                "chat template reads, such as enable_thinking"
            )
        without = not required and chat_template is None and not tokenizer.chat_template
        return cls(
            tokenizer=tokenizer if without else apply_template(tokenizer, chat_template, template_revision),
            end_token_ids=end_token_ids(tokenizer, base),
            chat_template_kwargs=dict(chat_template_kwargs or {}),
        )

    @property
    def template(self) -> str:
        """The text of the chat template; empty where there is none."""
        return str(self.tokenizer.chat_template or "")

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

    @cached_property
    def capabilities(self) -> Capabilities:
        """Which parts of a conversation the template writes, and in which form it wants them."""
        if not self.template:
            _own(self.tokenizer)  # says what is missing
        return probe(self._apply)

    def digest(self) -> str:
        """SHA-256 over everything that decides the tokens of a conversation."""
        parts: list[object] = [self._tokenizer_digest, self.template, sorted(self.end_token_ids)]
        if self.chat_template_kwargs:
            parts.append(dict(sorted(self.chat_template_kwargs.items())))
        if self.dated:
            parts.append(datetime.datetime.now(tz=datetime.UTC).astimezone().date().isoformat())
        return content_digest(json.dumps(parts).encode())

    def with_arguments(self, **arguments: Any) -> Renderer:
        """A copy with other `chat_template_kwargs`, beside those that it has."""
        return replace(self, chat_template_kwargs={**self.chat_template_kwargs, **arguments})

    def texts(
        self,
        conversations: Sequence[Conversation],
        *,
        tools: Sequence[Tools | None] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[str]:
        """Render conversations; with `add_generation_prompt` up to where an assistant's answer begins.

        Args:
            conversations: Messages as `chat.parse_messages` gives them.
            tools: What each conversation may call; None for none.
            add_generation_prompt: Whether an answer is asked for.

        Raises:
            RenderError: The template refuses one of them.
        """
        each_tools = [None] * len(conversations) if tools is None else tools
        pairs = zip(conversations, each_tools, strict=True)
        return [self._text(messages, own, index, add_generation_prompt) for index, (messages, own) in enumerate(pairs)]

    def prompts(self, chats: Sequence[Chat]) -> list[str]:
        """Render conversations up to where an answer to the last message begins; see `texts`.

        Documents, and single texts for a base without a chat template, come as they are, after the tokenizer's first
        token where the tokenizer itself begins a text with it.

        Raises:
            RenderError: The template refuses one of them, or there is none for a conversation.
        """
        return [self._prompt(chat, index) for index, chat in enumerate(chats)]

    def _prompt(self, chat: Chat, index: int) -> str:
        if self.template and not chat.raw:
            return self._text(chat.messages, chat.tools, index, True)
        if len(chat.messages) > 1 or chat.messages[0]["role"] != "user":
            raise RenderError("the model has no chat template, so its prompts must be texts, not chats", index)
        first = str(self.tokenizer.bos_token) if begins_with_bos(self.tokenizer) else ""
        return first + text_of(chat.messages[0])

    def _text(self, messages: Conversation, tools: Tools | None, index: int, add_generation_prompt: bool) -> str:
        try:
            return self._apply(self.capabilities.adapt(messages), tools, add_generation_prompt)
        except PROBLEMS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise RenderError(
                f"The chat template refuses a conversation with the roles {roles}: {error}; change dataset.system or "
                "the rows, or set dataset.chat_template",
                index,
            ) from error

    def _apply(self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.chat_template_kwargs,
            )
        )

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
