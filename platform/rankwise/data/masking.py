"""The loss mask of conversations.

What must hold, and is checked on every answer of every row: the tokens of the prompt (rendered with the generation
prompt, which is what generation starts from) are the first tokens of the whole conversation. Then, and only then, what
follows the prompt is what generation has to produce, and the mask covers it up to the first end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from rankwise.assets.progress import SILENT, Progress
from rankwise.data.conversation import answer_turns
from rankwise.data.encoding import Encoded, EncodedSet
from rankwise.data.renderer import Conversation, Renderer, RenderError
from rankwise.exceptions import DatasetError

if TYPE_CHECKING:
    from rankwise.data.rows import Example

BLOCK_ROWS = 2000
"""Rows whose texts are tokenized in one call: the tokenizer spreads a call over the cores."""
SHOWN_ROWS = 5
"""Rows that a message names."""


@dataclass(frozen=True, kw_only=True)
class _Turn:
    """The texts of one answer."""

    prompt: str
    upto: str
    """The conversation up to and with this answer."""


@dataclass(frozen=True, kw_only=True)
class _Break:
    """An answer whose prompt is not the beginning of the conversation."""

    id: str
    prompt: str
    full: str
    history: bool
    """Whether the answer itself is rendered differently once later turns follow."""


def mask_examples(
    examples: Sequence[Example],
    renderer: Renderer,
    max_length: int | None,
    progress: Progress | None = None,
) -> EncodedSet:
    """Tokens and masks of examples; see `encoding.encode`, which adds the cache.

    Raises:
        DatasetError: A prompt's tokens are not the first ones of the conversation's.
    """
    found = _Found()
    with (progress or SILENT).task("tokenizing", len(examples), "rows") as advance:
        for first in range(0, len(examples), BLOCK_ROWS):
            block = examples[first : first + BLOCK_ROWS]
            turns = [_turns(example, renderer) for example in block]
            texts = list(dict.fromkeys(text for row in turns for turn in row for text in (turn.prompt, turn.upto)))
            tokens = dict(zip(texts, renderer.tokens(texts), strict=True))
            for example, row in zip(block, turns, strict=True):
                found.add(example.id, _mask(example.id, row, tokens, renderer.end_token_ids), max_length)
            advance(len(block))
    if found.breaks:
        raise DatasetError(_explain(found.breaks, len(examples), renderer))
    return EncodedSet.of(
        found.rows,
        cut=tuple(found.cut),
        dropped=tuple(found.dropped),
        unended=tuple(found.unended),
        longest=found.longest,
    )


@dataclass(frozen=True, kw_only=True)
class _Masked:
    """A whole row: its tokens, the span of tokens of each answer, and whether each answer has an end token."""

    tokens: list[int]
    spans: list[tuple[int, int]]
    ended: bool


@dataclass(kw_only=True)
class _Found:
    """What became of the rows so far."""

    rows: list[Encoded] = field(default_factory=list)
    breaks: list[_Break] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    unended: list[str] = field(default_factory=list)
    longest: int = 0

    def add(self, row_id: str, masked: _Masked | _Break, max_length: int | None) -> None:
        """Sort a row in, within the length limit."""
        if isinstance(masked, _Break):
            self.breaks.append(masked)
            return
        if not masked.ended:
            self.unended.append(row_id)
        tokens = masked.tokens
        self.longest = max(self.longest, len(tokens))
        fitting = [span for span in masked.spans if max_length is None or span[1] <= max_length]
        if not fitting:
            self.dropped.append(row_id)
            return
        if len(fitting) < len(masked.spans):
            self.cut.append(row_id)
        if max_length is not None and len(tokens) > max_length:
            tokens = tokens[: fitting[-1][1]]
        supervised = np.zeros(len(tokens), np.bool_)
        for start, stop in fitting:
            supervised[start:stop] = True
        supervised[:1] = False  # nothing comes before the first token to predict it from
        self.rows.append(Encoded(id=row_id, input_ids=np.asarray(tokens, np.int32), supervised=supervised))


def _turns(example: Example, renderer: Renderer) -> list[_Turn]:
    places = answer_turns(example.messages)
    earlier: list[Conversation] = [example.messages[:place] for place in places[:-1]]
    upto: list[Conversation] = [example.messages[: place + 1] for place in places]
    try:
        prompts = [*renderer.texts(earlier, add_generation_prompt=True), example.prompt]
        texts = renderer.texts(upto)
    except RenderError as error:
        raise DatasetError(f"Row {example.id}: {error}") from error
    return [_Turn(prompt=prompt, upto=text) for prompt, text in zip(prompts, texts, strict=True)]


def _mask(row_id: str, turns: Sequence[_Turn], tokens: dict[str, list[int]], end: frozenset[int]) -> _Masked | _Break:
    full_text = turns[-1].upto
    full = tokens[full_text]
    spans = []
    all_ended = True
    for turn in turns:
        prompt, upto = tokens[turn.prompt], tokens[turn.upto]
        start = len(prompt)
        if upto[:start] != prompt:
            return _Break(id=row_id, prompt=turn.prompt, full=turn.upto, history=False)
        stop = next((place + 1 for place in range(start, len(upto)) if upto[place] in end), None)
        all_ended &= stop is not None
        stop = len(upto) if stop is None else stop
        if full[:stop] != upto[:stop]:
            return _Break(id=row_id, prompt=turn.upto, full=full_text, history=True)
        spans.append((start, stop))
    return _Masked(tokens=full, spans=spans, ended=all_ended)


def _explain(breaks: Sequence[_Break], count: int, renderer: Renderer) -> str:
    first = breaks[0]
    rows = ", ".join(each.id for each in breaks[:SHOWN_ROWS]) + (", ..." if len(breaks) > SHOWN_ROWS else "")
    head = f"The loss mask cannot be computed for {len(breaks):,} of {count:,} rows (rows {rows}): "
    same = next(
        (place for place, (a, b) in enumerate(zip(first.prompt, first.full, strict=False)) if a != b),
        min(len(first.prompt), len(first.full)),
    )
    shown = f"in row {first.id} they part after {first.prompt[max(0, same - 40) : same]!r}"
    if first.history:
        return (
            f"{head}the chat template renders an earlier answer differently once more turns follow (it may leave out "
            f"the thinking of earlier turns): {shown}, with {first.prompt[same : same + 40]!r} against "
            f"{first.full[same : same + 40]!r}. What was learned would not be what generation sees. Use rows with one "
            "answer each, or a dataset.chat_template that keeps earlier turns as they are"
        )
    if not first.full.startswith(first.prompt):
        return (
            f"{head}the chat template renders the prompt of a generation differently from the beginning of the whole "
            f"conversation: {shown}, with {first.prompt[same : same + 40]!r} in the prompt against "
            f"{first.full[same : same + 40]!r}. What was learned would not be what generation starts from. Give a "
            "dataset.chat_template whose add_generation_prompt part is the beginning of an assistant's turn"
        )
    prompt, full = renderer.tokens([first.prompt, first.full])
    place = next((i for i, (a, b) in enumerate(zip(prompt, full, strict=False)) if a != b), len(prompt) - 1)
    decode = renderer.tokenizer.convert_ids_to_tokens
    return (
        f"{head}the tokenizer joins the end of the prompt and the beginning of the answer into one token: in row "
        f"{first.id} the prompt ends with {first.prompt[-20:]!r}, the answer begins with "
        f"{first.full[len(first.prompt) :][:20]!r}; the prompt's token {place} is {decode(prompt[place])!r} alone and "
        f"{decode(full[place])!r} with the answer. Let the answer begin, or the prompt end, without white space, or "
        "put a newline or a special token between them in the chat template"
    )
