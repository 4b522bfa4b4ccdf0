"""What may be said to a predictor about how rows are answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from rankwise.inference.prompts import PromptReader
from rankwise.modeling.generation import Decoding


class Options(TypedDict, total=False):
    """How rows are answered; defaults are those of `Predictor.predict`.

    Attributes:
        prompt: A template over columns, such as `"carat {carat}, {cut}"`; by default a row has `messages` or `prompt`.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token.
        top_k: As `Decoding`.
        top_p: As `Decoding`.
        stop: As `Decoding`.
        seed: Of sampling: the row at place i draws from (seed, i), whatever shares its batch.
        batch_size: Rows that are decoded together; they may be of different adapters.
        fail_fast: Stop at the first row that cannot be answered, before anything is generated.
    """

    prompt: str | PromptReader | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop: Sequence[str]
    seed: int
    batch_size: int
    fail_fast: bool


def decoding_of(options: Options) -> Decoding:
    """The part of the options that decides on tokens.

    Raises:
        TypeError: There is no such option.
        ConfigError: A value is out of its range.
    """
    if unknown := sorted(set(options) - set(Options.__annotations__)):
        raise TypeError(f"no such options: {', '.join(unknown)}; there are {', '.join(Options.__annotations__)}")
    stop = options.get("stop", ())
    return Decoding(
        max_new_tokens=options.get("max_new_tokens", 64),
        temperature=options.get("temperature", 0.0),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
        # A text is one, not its letters.
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
