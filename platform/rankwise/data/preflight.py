"""Checks of the data before training.

Errors stop a run, because training would fail or learn nothing. Warnings do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rankwise.data.chat import REASONING, Message, text_of
from rankwise.data.masks import OPEN, Supervise
from rankwise.data.rows import row_keys
from rankwise.data.tokens import EncodedSet, kept
from rankwise.exceptions import DatasetError

if TYPE_CHECKING:
    from rankwise.data.rows import Example, Examples
    from rankwise.data.template import Renderer

SHOWN_ROWS = 5
"""Maximum number of row ids in a finding."""


@dataclass(frozen=True, kw_only=True)
class PreflightFinding:
    """One error or warning about the data."""

    code: str
    """A stable name, for programs and tests."""
    message: str
    count: int = 0
    """Number of affected rows; 0 if it is not about rows."""
    rows: tuple[str, ...] = ()
    """The ids of the first of them."""

    def __str__(self) -> str:
        if not self.rows:
            return self.message
        more = ", ..." if self.count > len(self.rows) else ""
        return f"{self.message} (rows {', '.join(self.rows)}{more})"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings on a definition's data, and its size."""

    errors: tuple[PreflightFinding, ...]
    warnings: tuple[PreflightFinding, ...]
    counts: dict[str, int]
    """`train.rows`, `train.tokens`, `train.supervised_tokens`, `train.longest`, `train.dropped`, `train.cut`,
    `train.truncated`, and the same for `eval`."""

    def raise_for_errors(self) -> None:
        """Stop a run whose data have errors.

        Raises:
            DatasetError: There are errors; the message has them all.
        """
        if self.errors:
            problems = tuple(str(finding) for finding in self.errors)
            raise DatasetError("\n".join(problems), problems)


def preflight(
    examples: Examples,
    train: EncodedSet,
    evaluation: EncodedSet | None,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    vocab_size: int | None = None,
    supervise: Supervise = "answers",
) -> Report:
    """Check encoded data before training.

    Args:
        examples: The rows.
        train: Their training side, encoded.
        evaluation: Their evaluation side, encoded; None, or empty without examples, where the definition has none.
        renderer: The renderer that encoded them.
        max_length: The length limit, for messages.
        vocab_size: Rows of the base's embedding; None where it is not known.
        supervise: As `dataset.supervise`.
    """
    errors = [*_renderer_errors(renderer, vocab_size)]
    warnings = [*_reading_warnings(examples), *_renderer_warnings(renderer)]
    counts: dict[str, int] = {}
    sides = [("train", examples.train, train)]
    if evaluation is not None and (examples.eval or len(evaluation)):
        sides.append(("eval", examples.eval, evaluation))
    for side, rows, encoded in sides:
        counts |= _counts(side, encoded)
        errors += _length_errors(side, rows, encoded, max_length)
        whole = supervise == "all_tokens" or is_documents(rows)
        errors += _mask_errors(side, encoded, whole=whole)
        errors += _vocabulary_errors(side, encoded, vocab_size)
        warnings += _length_warnings(side, encoded, max_length)
        warnings += _mask_warnings(side, encoded, whole=whole)
        warnings += _end_text_warnings(side, rows, renderer)
        warnings += _unwritten_warnings(side, rows, renderer)
        empty = [row.id for row in rows if not row.completion.strip() and not row.messages[-1].get("tool_calls")]
        if empty:
            text = f"{side}: {len(empty):,} of {len(rows):,} rows have an empty completion"
            (errors if len(empty) == len(rows) else warnings).append(_finding("empty_completion", text, empty))
    if evaluation is not None:
        warnings += _overlap_warnings(kept(examples.train, train), kept(examples.eval, evaluation), supervise)
    return Report(errors=tuple(errors), warnings=tuple(warnings), counts=counts)


def _finding(code: str, message: str, rows: Sequence[str] = ()) -> PreflightFinding:
    return PreflightFinding(code=code, message=message, count=len(rows), rows=tuple(rows[:SHOWN_ROWS]))


def _counts(side: str, encoded: EncodedSet) -> dict[str, int]:
    return {
        f"{side}.rows": len(encoded),
        f"{side}.tokens": encoded.tokens,
        f"{side}.supervised_tokens": encoded.supervised_tokens,
        f"{side}.longest": encoded.longest,
        f"{side}.dropped": len(encoded.dropped),
        f"{side}.cut": len(encoded.cut),
        f"{side}.truncated": len(encoded.truncated),
    }


def _renderer_errors(renderer: Renderer, vocab_size: int | None) -> Iterator[PreflightFinding]:
    if not renderer.end_token_ids:
        yield _finding(
            "no_end_token",
            "The base names no end token (eos_token of the tokenizer, eos_token_id of the generation configuration), "
            "so generation would never stop; use a base that has one",
        )
    if vocab_size is not None and renderer.pad_token_id >= vocab_size:
        yield _finding(
            "padding_beyond_vocabulary",
            f"The padding token {renderer.tokenizer.pad_token!r} is number {renderer.pad_token_id}, but the base's "
            f"embedding has {vocab_size:,} rows; use the tokenizer that belongs to this base",
        )


def _renderer_warnings(renderer: Renderer) -> Iterator[PreflightFinding]:
    if renderer.tokenizer.pad_token_id is None:
        filler = renderer.tokenizer.convert_ids_to_tokens(renderer.pad_token_id)
        yield _finding(
            "no_padding_token",
            f"The base's tokenizer has no padding token; {filler!r} is used and masked, which changes no result",
        )
    if renderer.dated:
        yield _finding(
            "dated_template",
            "The chat template writes the current date, so the same rows give different tokens on another day; for "
            "repeatable results set dataset.chat_template to a copy with a fixed date",
        )


def _reading_warnings(examples: Examples) -> Iterator[PreflightFinding]:
    for reason, count in examples.dropped.items():
        yield PreflightFinding(
            code="left_out", message=f"{count:,} {'row' if count == 1 else 'rows'} left out: {reason}", count=count
        )
    for note in examples.notes:
        yield _finding("reading", note)


def _length_errors(
    side: str, rows: Sequence[Example], encoded: EncodedSet, max_length: int | None
) -> Iterator[PreflightFinding]:
    if len(encoded):
        return
    if not rows:
        yield _finding("no_rows", f"{side}: there are no rows")
        return
    yield _finding(
        "no_rows",
        f"{side}: none of the {len(rows):,} rows fits into training.max_length={max_length} with its answer (the "
        f"longest has {encoded.longest:,} tokens); raise it, or shorten the prompt",
        encoded.dropped,
    )


_FEW = 0.01
"""Share of rows that may be lost to the length limit without advice."""


def _length_warnings(side: str, encoded: EncodedSet, max_length: int | None) -> Iterator[PreflightFinding]:
    total = len(encoded.whole_lengths)
    longer = f"longer than training.max_length={max_length} (the longest has {encoded.longest:,} tokens)"
    for code, rows, what in (
        ("too_long", encoded.dropped if len(encoded) else (), "are left out, because they are"),
        ("cut", encoded.cut, "lose answers, because they are"),
        ("truncated", encoded.truncated, "lose the end of their answer, because they are"),
    ):
        if not rows:
            continue
        advice = ""
        if len(rows) > _FEW * total:
            advice = f"; training.max_length: {encoded.covering(0.99)} leaves 99 % of the rows whole"
        yield _finding(code, f"{side}: {len(rows):,} of {total:,} rows {what} {longer}{advice}", rows)


def _mask_errors(side: str, encoded: EncodedSet, *, whole: bool) -> Iterator[PreflightFinding]:
    if encoded.unended:
        yield _finding(
            "no_end",
            f"{side}: the chat template does not end the assistant's turn with an end token in "
            f"{len(encoded.unended):,} rows, so a model trained on them would not stop; set a "
            "dataset.chat_template that writes eos_token after the answer",
            encoded.unended,
        )
    if not len(encoded):
        return
    supervised, lengths = encoded.supervised_lengths, encoded.lengths
    if not supervised.any():
        yield _finding("none_supervised", f"{side}: no token of any row is supervised", encoded.ids)
    elif not whole and (supervised >= lengths - 1).all():
        yield _finding(
            "all_supervised", f"{side}: every token of every row is supervised: the prompts are empty", encoded.ids
        )


def _mask_warnings(side: str, encoded: EncodedSet, *, whole: bool) -> Iterator[PreflightFinding]:
    if not len(encoded):
        return
    for code, what, where in (
        ("row_none_supervised", "no supervised token", encoded.supervised_lengths == 0),
        ("row_all_supervised", "nothing but supervised tokens", encoded.supervised_lengths >= encoded.lengths - 1),
    )[: 1 if whole else 2]:
        rows = _ids(encoded, where)
        if rows and len(rows) < len(encoded):
            yield _finding(code, f"{side}: {len(rows):,} of {len(encoded):,} rows have {what}", rows)


def _ids(encoded: EncodedSet, where: npt.NDArray[np.bool_]) -> list[str]:
    return [encoded.ids[place] for place in np.flatnonzero(where)]


def _vocabulary_errors(side: str, encoded: EncodedSet, vocab_size: int | None) -> Iterator[PreflightFinding]:
    if vocab_size is None:
        return
    places = np.flatnonzero(encoded.input_ids >= vocab_size)
    if not len(places):
        return
    rows = np.unique(np.searchsorted(encoded.offsets, places, side="right") - 1)
    yield _finding(
        "beyond_vocabulary",
        f"{side}: {len(rows):,} rows have tokens beyond the {vocab_size:,} rows of the base's embedding, such as "
        f"{int(encoded.input_ids[places[0]])}; the tokenizer or the chat template does not belong to this base",
        [encoded.ids[row] for row in rows],
    )


def _end_text_warnings(side: str, rows: Sequence[Example], renderer: Renderer) -> Iterator[PreflightFinding]:
    texts = [renderer.tokenizer.decode([token]) for token in sorted(renderer.end_token_ids)]
    found = [
        row.id
        for row in rows
        if any(text and text in text_of(turn) for turn in row.messages if turn["role"] == "assistant" for text in texts)
    ]
    if found:
        yield _finding(
            "end_token_inside",
            f"{side}: {len(found):,} rows have an end token inside an answer ({', '.join(map(repr, texts))}); the "
            "tokens after it are not trained",
            found,
        )


def is_documents(rows: Sequence[Example]) -> bool:
    """Whether examples are documents (`dataset.format: text`), without questions and answers."""
    return bool(rows) and not rows[0].messages


def _unwritten_warnings(side: str, rows: Sequence[Example], renderer: Renderer) -> Iterator[PreflightFinding]:
    """Parts of conversations that the template leaves out in training and inference alike."""
    if is_documents(rows):
        return
    able = renderer.capabilities
    tools = [row.id for row in rows if row.tools] if not able.tools else []
    thoughts = [row.id for row in rows if _has_reasoning(row)] if able.reasoning is None else []
    if tools:
        yield _finding(
            "tools_not_written",
            f"{side}: the chat template does not write the tools of {len(tools):,} rows, so the model does not see "
            "them; set dataset.chat_template to one that does",
            tools,
        )
    if thoughts and OPEN not in renderer.template:
        yield _finding(
            "reasoning_not_written",
            f"{side}: the chat template does not write the reasoning of {len(thoughts):,} rows, so it is not learned; "
            "set dataset.chat_template to one that does",
            thoughts,
        )


def _has_reasoning(row: Example) -> bool:
    return any(message.get(REASONING[0]) for message in row.messages)


def _overlap_warnings(
    train: Sequence[Example], evaluation: Sequence[Example], supervise: Supervise
) -> Iterator[PreflightFinding]:
    pairs = {pair for row in train for pair in _pairs(row, supervise)}
    prompts = {prompt for prompt, _ in pairs}
    same, asked = [], []
    for row in evaluation:
        own = _pairs(row, supervise)
        if pairs.issuperset(own):
            same.append(row.id)
        elif any(prompt in prompts for prompt, _ in own):
            asked.append(row.id)
    if same:
        yield _finding(
            "shared_rows",
            f"{len(same):,} of {len(evaluation):,} evaluation rows are also training rows, with the same prompt and "
            "completion, so their results measure memorization; dataset.eval: {split_from: train, rows: ...} keeps "
            "equal prompts on one side",
            same,
        )
    if asked:
        yield _finding(
            "shared_prompts",
            f"{len(asked):,} of {len(evaluation):,} evaluation rows share a prompt with training rows, but not the "
            "completion",
            asked,
        )


def _pairs(row: Example, supervise: Supervise) -> list[tuple[str, str]]:
    """The key of what comes before each answer of a row, and the answer."""
    keys = row_keys(row, (), supervise)
    if not row.messages:
        return [(keys[0], "")]
    places = row.chat.answers[-len(keys) :]
    return [(key, _answer(row.messages[place])) for key, place in zip(keys, places, strict=True)]


def _answer(message: Message) -> str:
    return json.dumps([text_of(message), message.get("tool_calls")], default=str)
