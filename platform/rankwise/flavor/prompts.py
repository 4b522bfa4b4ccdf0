"""Prompts to measure two models' agreement on: a few built-in ones, or a sample out of a file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from rankwise.data.renderer import Renderer
from rankwise.exceptions import ConfigError
from rankwise.flavor.inputs import read_input

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
    """A random sample of a file's prompts, in the file's order.

    Args:
        path: `.jsonl` with texts or objects that have `prompt` or `messages` (other keys are left alone), or a text
            file with one prompt a line.
        count: How many at most.
        seed: Of the sample.

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


def tokens_of(prompts: list[Any], tokenizer: Any, base: Path, system: str | None) -> list[list[int]]:
    """Token ids of prompts up to where an answer begins: through the chat template, or bare where there is none.

    Raises:
        ConfigError: A prompt has none of the forms, is a chat where there is no template, or the template refuses it.
    """
    chats = read_input(prompts, system)
    if tokenizer.chat_template:
        renderer = Renderer.create(tokenizer, base=base)
        return renderer.tokens(renderer.texts(chats, add_generation_prompt=True))
    if any(len(chat) > 1 for chat in chats):
        raise ConfigError("the model has no chat template, so its prompts must be texts, not chats")
    return [list(tokenizer(chat[0]["content"])["input_ids"]) for chat in chats]


def _entry(line: str, where: str) -> Any:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not JSON: {error}") from error
    if isinstance(value, str):
        return value
    found = [name for name in ("messages", "prompt") if isinstance(value, dict) and name in value]
    if len(found) != 1:
        raise ConfigError(f"{where}: must be a text, or an object with either 'messages' or 'prompt'")
    return {found[0]: value[found[0]]}
