"""Conversations to tokens with a loss mask: what generation sees, and what it has to produce, for each answer.

For each answer two texts are rendered: the prompt (the turns before it, with the generation prompt: what generation
starts from) and the conversation up to and with the answer. What must hold, and is checked on every answer of every
row: the tokens of the prompt are the first tokens of the other. Then, and only then, what follows the prompt is what
generation has to produce, and the mask covers it up to the first end token.

Answers of a conversation share one sequence where the later text begins with the earlier one. Where a template rewrites
history (leaves out the thinking of earlier turns, ends the last turn differently), they do not, and the conversation is
**unrolled**: one sequence for each answer that generation sees another way.

A template may open a thought in the generation prompt (`<think>`) and render an answer without one. Then the sequence
is the prompt, the thought that the row has (or none), the end of the thought as the template writes it, and the answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from rankwise.data.chat import REASONING, Chat, Message, text_of
from rankwise.data.template import Renderer, RenderError
from rankwise.exceptions import DatasetError

Supervise = Literal["answers", "last_answer", "all_tokens"]
Overlong = Literal["auto", "drop", "truncate", "error", "whole_answers"]
"""As `dataset.overlong`; `auto` is its default, `whole_answers` that of definitions before `overlong`: answers that
fit whole are kept, and a row without one is left out."""

OPEN, CLOSE = "<think>", "</think>"
_NO_THOUGHT = re.compile(r"<think>\s*</think>\s*")
_INLINE = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
_DEFAULT_CLOSE = f"\n{CLOSE}\n\n"
_OTHER = "xqotherq"
_SWITCHES = ("enable_thinking", "thinking")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The texts of one answer; `text` is the prompt, the answer and the end of its turn."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Break:
    """An answer that cannot be trained."""

    id: str
    prompt: str
    full: str
    reason: str | None = None
    """Why, with the setting that helps; None where the texts do not fit together."""


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """One sequence of a conversation: its tokens, and the span of tokens of each answer in it."""

    tokens: list[int]
    spans: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Masked:
    """The sequences of a conversation, and whether each answer has an end token."""

    sequences: list[TokenSequence]
    ended: bool

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(sequence.tokens) for sequence in self.sequences)


def answer_texts(
    chat: Chat, row_id: str, renderer: Renderer, supervise: Supervise, prompt: str
) -> list[Answer] | Break:
    """The texts of the answers to learn. `prompt` is that of the last one, which is rendered already.

    Raises:
        DatasetError: The chat template refuses the conversation.
    """
    places = chat.answers if supervise == "answers" else chat.answers[-1:]
    try:
        prompts = renderer.texts(
            [chat.messages[:place] for place in places[:-1]],
            tools=[chat.tools] * (len(places) - 1),
            add_generation_prompt=True,
        )
        texts = renderer.texts([chat.messages[: place + 1] for place in places], tools=[chat.tools] * len(places))
    except RenderError as error:
        raise DatasetError(f"Row {row_id}: {error}") from error
    answers = []
    for place, start, text in zip(places, [*prompts, prompt], texts, strict=True):
        reason = _unwritten(chat, place, start, text, renderer)
        if reason is not None:
            return Break(id=row_id, prompt=start, full=text, reason=reason)
        whole = text if text.startswith(start) else _after_opened_thought(start, text, chat.messages[place], renderer)
        if whole is None:
            return Break(id=row_id, prompt=start, full=text, reason=_switch(chat, place, renderer))
        answers.append(Answer(prompt=start, text=_ended(chat, place, start, whole, renderer)))
    return answers


def _ended(chat: Chat, place: int, prompt: str, text: str, renderer: Renderer) -> str:
    """The sequence with the end token by which the next turn begins, where the answer's own turn has none (GLM)."""
    ends = [str(renderer.tokenizer.convert_ids_to_tokens(token)) for token in sorted(renderer.end_token_ids)]
    if any(end in text[len(prompt) :] for end in ends):
        return text
    # Without its reasoning, which many templates leave out once another turn follows.
    answer = {key: value for key, value in chat.messages[place].items() if key != REASONING[0]}
    following = (
        {"role": "tool", "name": "x", "content": "x"} if answer.get("tool_calls") else {"role": "user", "content": "x"}
    )
    messages = [*chat.messages[:place], answer]
    try:
        short, longer = renderer.texts([messages, [*messages, following]], tools=[chat.tools] * 2)
    except RenderError:
        return text
    rest = longer[len(short) :] if longer.startswith(short) else ""
    return text + next((end for end in ends if rest.startswith(end)), "")


def reference(chat: Chat, row_id: str, renderer: Renderer, prompt: str) -> str:
    """What generation has to produce for the last answer, as it decodes it.

    The content of the answer, unless the template writes more than that: a call, or a thought.
    """
    content = text_of(chat.messages[-1])
    if (
        not chat.messages[-1].get("tool_calls")
        and OPEN not in renderer.template
        and not renderer.capabilities.reasoning
    ):
        return content
    answers = answer_texts(chat, row_id, renderer, "last_answer", prompt)
    if isinstance(answers, Break):
        return content  # it is refused when its mask is made
    (start, whole) = renderer.tokens([answers[0].prompt, answers[0].text])
    produced = whole[len(start) :]
    stop = next((place for place, token in enumerate(produced) if token in renderer.end_token_ids), len(produced))
    text = str(renderer.tokenizer.decode(produced[:stop], skip_special_tokens=True))
    return content if text.split() == content.split() else text


def _after_opened_thought(prompt: str, text: str, answer: Message, renderer: Renderer) -> str | None:
    """The sequence of an answer without a thought, after a prompt that opens one; None where that is not the case."""
    header, opened, rest = prompt.rpartition(OPEN)
    if not opened or rest.strip() or not text.startswith(header):
        return None
    body = text[len(header) :]
    empty = _NO_THOUGHT.match(body)
    if empty is not None:
        body = body[empty.end() :]
    elif body.startswith(OPEN):
        return None
    inline = _INLINE.match(text_of(answer))
    thought = answer.get(REASONING[0]) or (inline[1] if inline else "")
    close = renderer.capabilities.close
    return prompt + str(thought).strip("\n") + (close if close and CLOSE in close else _DEFAULT_CLOSE) + body


def _unwritten(chat: Chat, place: int, prompt: str, text: str, renderer: Renderer) -> str | None:
    """Why an answer is no measure of the row: the template leaves a part of the conversation out."""
    able = renderer.capabilities
    answer = chat.messages[place]
    advice = "set dataset.chat_template to a template that does, or leave these rows out"
    for index, message in enumerate(chat.messages[:place]):
        able_to = {"tool": able.results, "system": able.system}.get(message["role"], True)
        if not able_to and text_of(message).strip() and _same(chat, place, index, renderer, prompt, asked=True):
            return f"the chat template does not write messages of the role {message['role']}; {advice}"
    calls = answer.get("tool_calls")
    if calls and not able.calls and _same(chat, place + 1, place, renderer, text, calls=True):
        return f"the chat template does not write tool_calls, so an empty answer would be learned; {advice}"
    content = _INLINE.sub("", text_of(answer), count=1).strip()
    written = text[len(prompt) if text.startswith(prompt) else _common(prompt, text) :]
    if content and content not in written and _same(chat, place + 1, place, renderer, text):
        return f"the chat template does not write the answer; {advice}"
    return None


def _common(one: str, other: str) -> int:
    """The number of characters at the beginning that two texts have in common."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _same(
    chat: Chat, stop: int, index: int, renderer: Renderer, text: str, *, calls: bool = False, asked: bool = False
) -> bool:
    """Whether the rendered text stays the same when the message `index` is another."""
    message = chat.messages[index]
    if calls:
        function = {"name": _OTHER, "arguments": {_OTHER: _OTHER}}
        changed = {**message, "tool_calls": [{**call, "function": function} for call in message["tool_calls"]]}
    else:
        changed = {**message, "content": _OTHER}
    messages = [*chat.messages[:index], changed, *chat.messages[index + 1 : stop]]
    try:
        (other,) = renderer.texts([messages], tools=[chat.tools], add_generation_prompt=asked)
    except RenderError:
        return False
    return other == text


def _switch(chat: Chat, place: int, renderer: Renderer) -> str | None:
    """The argument of the template under which prompt and answer fit together, if there is one."""
    for name in _SWITCHES:
        if not re.search(rf"\b{name}\b", renderer.template):
            continue
        for value in (True, False):
            other = renderer.with_arguments(**{name: value})
            try:
                (prompt,) = other.texts([chat.messages[:place]], tools=[chat.tools], add_generation_prompt=True)
                (text,) = other.texts([chat.messages[: place + 1]], tools=[chat.tools])
            except RenderError:
                continue
            if text.startswith(prompt):
                thinks = "reasons" if value else "answers without reasoning"
                return (
                    f"the answer {thinks}, while the generation prompt says otherwise; set "
                    f"dataset.chat_template_kwargs: {{{name}: {str(value).lower()}}}"
                )
    return None


def mask(row_id: str, answers: Sequence[Answer], tokens: dict[str, list[int]], end: frozenset[int]) -> Masked | Break:
    """The sequences of a conversation and the spans of its answers.

    Args:
        row_id: Names the row.
        answers: In order.
        tokens: Of every text of theirs.
        end: The end tokens.
    """
    spans: list[tuple[int, int]] = []
    ended = True
    for answer in answers:
        prompt, whole = tokens[answer.prompt], tokens[answer.text]
        start = len(prompt)
        if whole[:start] != prompt:
            return Break(id=row_id, prompt=answer.prompt, full=answer.text)
        stop = next((place + 1 for place in range(start, len(whole)) if whole[place] in end), None)
        ended &= stop is not None
        spans.append((start, len(whole) if stop is None else stop))
    sequences: list[TokenSequence] = []
    for answer, span in zip(reversed(answers), reversed(spans), strict=True):
        whole = tokens[answer.text]
        # The nearest later answer first: most conversations are one sequence.
        for sequence in reversed(sequences):
            if sequence.tokens[: span[1]] == whole[: span[1]]:
                sequence.spans.insert(0, span)
                break
        else:
            sequences.append(TokenSequence(tokens=whole, spans=[span]))
    return Masked(sequences=sequences[::-1], ended=ended)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What the length limit leaves of a conversation."""

    sequences: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = field(default_factory=list)
    """Tokens and mask of each sequence."""
    lost: bool = False
    """Whether an answer was left out, or the end of one cut off."""
    truncated: bool = False
    """Whether the last answer that was kept is not whole."""


def fit(masked: Masked, max_length: int | None, overlong: Overlong, *, everything: bool = False) -> Fitted:
    """Apply the length limit to a conversation.

    Args:
        masked: The conversation.
        max_length: Most tokens of a sequence; None for no limit.
        overlong: What becomes of a longer one.
        everything: Supervise all tokens, not only the answers.
    """
    limit = masked.longest if max_length is None else max_length
    kept: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = []
    lost = False
    whole_answers = overlong in {"auto", "whole_answers"}
    for sequence in masked.sequences:
        long = len(sequence.tokens) > limit
        if long and overlong in {"drop", "error"}:
            lost = True
            continue
        spans = [span for span in sequence.spans if span[1] <= limit]
        lost |= len(spans) < len(sequence.spans)
        if long and not whole_answers:
            spans = [(start, min(stop, limit)) for start, stop in sequence.spans if start < limit]
        if spans:
            stop = limit if long and not whole_answers else spans[-1][1] if long else len(sequence.tokens)
            kept.append(_arrays(sequence.tokens[:stop], spans, everything))
    if kept or overlong in {"drop", "error", "whole_answers"}:
        return Fitted(sequences=kept, lost=lost, truncated=lost and overlong == "truncate")
    first = masked.sequences[0]
    if first.spans[0][0] >= limit:  # not even the prompt fits
        return Fitted(lost=True)
    arrays = _arrays(first.tokens[:limit], [(first.spans[0][0], limit)], everything)
    return Fitted(sequences=[arrays], lost=True, truncated=True)


def _arrays(
    tokens: list[int], spans: Sequence[tuple[int, int]], everything: bool
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    supervised = np.full(len(tokens), everything, np.bool_)
    for start, stop in spans:
        supervised[start:stop] = True
    supervised[:1] = False  # nothing comes before the first token to predict it from
    return np.asarray(tokens, np.int32), supervised


SHOWN_ROWS = 5
"""Rows that a message names."""


def explain(breaks: Sequence[Break], count: int, renderer: Renderer) -> str:
    """Why conversations cannot be trained, from the first of them, and the setting that helps."""
    first = breaks[0]
    rows = ", ".join(each.id for each in breaks[:SHOWN_ROWS]) + (", ..." if len(breaks) > SHOWN_ROWS else "")
    head = f"The loss mask cannot be computed for {len(breaks):,} of {count:,} rows (rows {rows}): "
    if first.reason is not None:
        return head + first.reason
    same = _common(first.prompt, first.full)
    shown = f"in row {first.id} they differ after {first.prompt[max(0, same - 40) : same]!r}"
    if not first.full.startswith(first.prompt):
        return (
            f"{head}the chat template renders the prompt of a generation differently from the beginning of the whole "
            f"conversation: {shown}, with {first.prompt[same : same + 40]!r} in the prompt against "
            f"{first.full[same : same + 40]!r}. Training would not match what generation starts from. Set a "
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
