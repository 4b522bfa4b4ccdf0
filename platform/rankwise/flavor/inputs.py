"""Forms of input that a stored adapter accepts, and prompts from files; each becomes a list of conversations.

| form | answers |
|---|---|
| a text | one |
| a list, tuple, Series or array of texts | one each |
| a message `{"role", "content"}` | one |
| one chat: a list of messages | one |
| a list, tuple, Series or array of chats (`{"messages": [...]}` or lists of messages) | one each |
| a dict with `messages` (one chat or a list of chats) or `prompt` (a text or a list of texts) | as many |
| a list of such dicts with one chat or one text | one each |
| a table, a list of dicts, a dict or a dict of lists with the columns of the prompt template of training | one a row |
| a table with the column `messages` or `prompt`, or with one column only | one a row |

Rows are rendered as in training (`rankwise.data.prompting`). A text is the user's turn of a chat, after the recorded
system prompt, if any; a chat without a system message gets that too. A message has a `role` and a `content` (a text or
text parts), or `tool_calls`, and whatever else the chat template writes; a dict with `messages`, and a table, may have
`tools`. A chat has at least one message. Anything else is a `ConfigError` that names the row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rankwise.data.chat import Chat, text_of
from rankwise.data.prompting import FIRST_READING, Reading, RowPrompts
from rankwise.data.tables import narrowed
from rankwise.data.template import Renderer
from rankwise.exceptions import ConfigError, DatasetError

_FORMS = (
    "a text, a list of texts, a chat (a list of {'role', 'content'}), a list of chats, a dict with 'messages' or "
    "'prompt', an array, rows with the columns of the prompt template, or a table with a column 'messages' or 'prompt' "
    "or with a single column"
)


def read_input(data: Any, system: str | None = None, reading: Reading = FIRST_READING) -> list[Chat]:
    """Convert any form in the table above to conversations.

    Args:
        data: The input.
        system: A system prompt before plain texts.
        reading: How rows became prompts in training.

    Raises:
        ConfigError: The input has none of the forms; the message names the row and its type.
    """
    prompts = RowPrompts(reading=reading, system=system)
    rows = _template_rows(data, prompts)
    if rows is not None:
        chats = []
        for index, row in enumerate(rows):
            try:
                chats.append(prompts.chat(row))
            except DatasetError as error:
                raise ConfigError(f"row {index}: {error}") from error
        return chats
    if isinstance(data, pd.DataFrame):
        data = _column(data)
    if isinstance(data, pd.Series):
        data = data.tolist()
    data = _plain(data)
    tools = None
    if isinstance(data, Mapping) and not _is_message(data):
        data, tools = _member(data)
    if isinstance(data, str) or _is_message(data):
        return [_chat(data, tools, prompts, "the input")]
    if isinstance(data, list | tuple):
        if data and all(_is_message(entry) for entry in data):
            return [_chat(list(data), tools, prompts, "the input")]
        return [_chat(entry, tools, prompts, f"row {index}") for index, entry in enumerate(data)]
    raise ConfigError(f"the input must be {_FORMS}; got {type(data).__name__}")


def rows_of_table(data: Any) -> Any:
    """A table as a list of its rows; anything else as it is. Cells keep their types, such as numbers of 32 bits."""
    if not isinstance(data, pd.DataFrame):
        return data
    columns = []
    for place in range(len(data.columns)):
        series = data.iloc[:, place]
        cells = list(series.array)
        if isinstance(series.dtype, pd.ArrowDtype):
            cells = narrowed(cells, series.dtype.pyarrow_dtype)
        columns.append(cells)
    names = list(data.columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _template_rows(data: Any, prompts: RowPrompts) -> list[Mapping[str, Any]] | None:
    """The rows of an input with the columns that training made prompts of; None if there are none."""
    data = rows_of_table(data)
    if isinstance(data, Mapping) and "messages" not in data and prompts.reads(data):
        cells = [
            list(value) if isinstance(value, list | tuple | np.ndarray | pd.Series) else None for value in data.values()
        ]
        if not any(cell is not None for cell in cells):
            return [data]
        lengths = {None if cell is None else len(cell) for cell in cells}
        if len(lengths) > 1:
            raise ConfigError("the columns of a dict of lists must be equally long lists")
        return [dict(zip(data, values, strict=True)) for values in zip(*(cell or [] for cell in cells), strict=True)]
    if isinstance(data, np.ndarray) and data.ndim == 1 and data.dtype == object:
        data = list(data)
    rows = isinstance(data, list | tuple) and data and all(isinstance(row, Mapping) for row in data)
    return list(data) if rows and prompts.reads(data[0]) else None


def _column(table: pd.DataFrame) -> list[Any]:
    for name in ("messages", "prompt"):
        if name in table.columns:
            if name == "messages" and "tools" in table.columns:
                return table[["messages", "tools"]].to_dict(orient="records")
            return list(table[name])
    if len(table.columns) == 1:
        return list(table.iloc[:, 0])
    if set(table.columns) == {"role", "content"}:
        # A chat that went through a table on its way (MLflow turns a list of dicts into one).
        return [{"messages": table.to_dict(orient="records")}]
    raise ConfigError(
        "a table needs a column 'messages' or 'prompt', or a single column; it has "
        f"{', '.join(map(str, table.columns)) or 'none'}"
    )


def _plain(value: Any) -> Any:
    """Arrays as lists, and their elements as Python's own types, at any depth: MLflow's server makes arrays."""
    if isinstance(value, np.ndarray):
        return _plain(_flat(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _flat(array: np.ndarray) -> Any:
    if array.ndim == 0:
        return array.item()
    if array.ndim == 2 and array.size and all(_is_message(entry) for entry in array.flat):
        return array.tolist()  # Chats of equal length, a row each.
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ConfigError(f"an array must have one dimension, or one column; got the shape {array.shape}")
    return array.tolist()


def _member(data: Mapping[str, Any]) -> tuple[Any, Any]:
    """What a dict asks, and the tools that come with it."""
    named = [name for name in ("messages", "prompt") if name in data]
    if len(named) != 1 or not set(data) <= {named[0], *(("tools",) if named == ["messages"] else ())}:
        raise ConfigError(
            f"a dict must have the key 'messages' or 'prompt' and no other; got {', '.join(map(str, data)) or 'none'}; "
            "parameters such as max_new_tokens go into params, and tools beside messages"
        )
    return data[named[0]], data.get("tools")


def _chat(entry: Any, tools: Any, prompts: RowPrompts, where: str) -> Chat:
    if isinstance(entry, Mapping) and not _is_message(entry):
        entry, own = _member(entry)
        tools = tools if own is None else own
        if isinstance(entry, list | tuple) and entry and not all(_is_message(one) for one in entry):
            raise ConfigError(f"{where}: a dict inside a list must hold one text or one chat, got {_kind(entry)}")
    if isinstance(entry, str):
        if not entry:
            raise ConfigError(f"{where}: the text is empty")
        return prompts.asked(entry)
    messages = [entry] if _is_message(entry) else entry
    if not isinstance(messages, list | tuple) or not messages:
        raise ConfigError(f"{where}: must be a text or a chat, got {_kind(entry)}; allowed are: {_FORMS}")
    for turn_index, message in enumerate(messages):
        if not _is_message(message):
            raise ConfigError(
                f"{where}: message {turn_index} must have 'role' and 'content', both texts; got {_kind(message)}"
            )
    try:
        return prompts.conversation(list(messages), tools)
    except DatasetError as error:
        raise ConfigError(f"{where}: {error}") from error


def _is_message(value: Any) -> bool:
    """Whether something is a message; contents are checked where the chat is read."""
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str | list) or bool(value.get("tool_calls"))


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(str, value)) or '(none)'}"
    if isinstance(value, list | tuple) and not value:
        return "an empty list"
    return type(value).__name__


BUILT_IN = (
    "How are you today?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "2 + 2 =",
    "Name three colors.",
    "Translate to German: Good morning.",
    "Is water wet? Answer yes or no.",
    "Once upon a time",
)


def read_prompts(path: Path, count: int, seed: int = 0) -> list[Any]:
    """A random sample of a file's prompts, at most `count`, in the file's order.

    `.jsonl` files have texts or objects with `prompt` or `messages` (other keys are ignored); other files have one
    prompt per line.

    Raises:
        ConfigError: The file cannot be read, or a line has none of the forms.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"cannot read the prompts in {path}: {reason}") from error
    if not lines:
        raise ConfigError(f"{path} has no prompts")
    chosen = sorted(random.Random(seed).sample(range(len(lines)), min(count, len(lines))))
    if path.suffix != ".jsonl":
        return [lines[index] for index in chosen]
    return [_entry(lines[index], f"{path}: line {index + 1} with content") for index in chosen]


def tokens_of(
    prompts: list[Any], tokenizer: Any, base: Path, system: str | None, reading: Reading = FIRST_READING
) -> list[list[int]]:
    """Token ids of prompts, up to where the answer begins: through the chat template, or of the text without one.

    Raises:
        ConfigError: A prompt has none of the forms or is a chat without a template, or the template refuses it.
    """
    chats = read_input(prompts, system, reading)
    if tokenizer.chat_template:
        renderer = Renderer.create(tokenizer, base=base, chat_template_kwargs=reading.chat_template_kwargs)
        return renderer.tokens(renderer.prompts(chats))
    if any(len(chat.messages) > 1 for chat in chats):
        raise ConfigError("the model has no chat template, so its prompts must be texts, not chats")
    return [list(tokenizer(text_of(chat.messages[0]))["input_ids"]) for chat in chats]


def _entry(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if isinstance(value, str):
        return value
    keys = [name for name in ("messages", "prompt") if isinstance(value, dict) and name in value]
    if len(keys) != 1:
        raise ConfigError(f"{where}: must be a text, or an object with either 'messages' or 'prompt'")
    return {keys[0]: value[keys[0]]}
