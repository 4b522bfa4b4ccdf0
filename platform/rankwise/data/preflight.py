"""What can be known to be wrong with the data before anything is trained.

Errors stop a run: what they find would train nothing, or crash. Warnings are for a person to judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rankwise.data.encoding import EncodedSet, kept
from rankwise.exceptions import DatasetError

if TYPE_CHECKING:
    from rankwise.data.renderer import Renderer
    from rankwise.data.rows import Example, Examples

SHOWN_ROWS = 5
"""Offending rows that a finding names."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or looks wrong."""

    code: str
    """A stable name, for programs and tests."""
    message: str
    count: int = 0
    """How many rows are concerned; 0 where it is not about rows."""
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

    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    counts: dict[str, int]
    """`train.rows`, `train.tokens`, `train.supervised_tokens`, `train.longest`, `train.dropped`, `train.cut`, and the
    same for `eval`."""

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
) -> Report:
    """Check encoded data before training.

    Args:
        examples: The rows.
        train: Their training side, encoded.
        evaluation: Their evaluation side, encoded; None, or empty without examples, where the definition has none.
        renderer: The renderer that encoded them.
        max_length: The length limit, for messages.
        vocab_size: Rows of the base's embedding; None where it is not known.
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
        errors += _mask_errors(side, encoded)
        errors += _vocabulary_errors(side, encoded, vocab_size)
        warnings += _length_warnings(side, encoded, max_length)
        warnings += _mask_warnings(side, encoded)
        warnings += _end_text_warnings(side, rows, renderer)
        empty = [row.id for row in rows if not row.completion.strip()]
        if empty:
            text = f"{side}: {len(empty):,} of {len(rows):,} rows have an empty completion"
            (errors if len(empty) == len(rows) else warnings).append(_finding("empty_completion", text, empty))
    if evaluation is not None:
        warnings += _overlap_warnings(kept(examples.train, train), kept(examples.eval, evaluation))
    return Report(errors=tuple(errors), warnings=tuple(warnings), counts=counts)


def _finding(code: str, message: str, rows: Sequence[str] = ()) -> Finding:
    return Finding(code=code, message=message, count=len(rows), rows=tuple(rows[:SHOWN_ROWS]))


def _counts(side: str, encoded: EncodedSet) -> dict[str, int]:
    return {
        f"{side}.rows": len(encoded),
        f"{side}.tokens": encoded.tokens,
        f"{side}.supervised_tokens": encoded.supervised_tokens,
        f"{side}.longest": encoded.longest,
        f"{side}.dropped": len(encoded.dropped),
        f"{side}.cut": len(encoded.cut),
    }


def _renderer_errors(renderer: Renderer, vocab_size: int | None) -> Iterator[Finding]:
    if not renderer.end_token_ids:
        yield _finding(
            "no_end_token",
            "The base names no end token (eos_token of the tokenizer, eos_token_id of the generation configuration), "
            "so that generation would never stop; use a base that has one",
        )
    if vocab_size is not None and renderer.pad_token_id >= vocab_size:
        yield _finding(
            "padding_beyond_vocabulary",
            f"The padding token {renderer.tokenizer.pad_token!r} is number {renderer.pad_token_id}, but the base's "
            f"embedding has {vocab_size:,} rows; the tokenizer does not belong to this base",
        )


def _renderer_warnings(renderer: Renderer) -> Iterator[Finding]:
    if renderer.tokenizer.pad_token_id is None:
        filler = renderer.tokenizer.convert_ids_to_tokens(renderer.pad_token_id)
        yield _finding(
            "no_padding_token",
            f"The base's tokenizer has no padding token; {filler!r} fills batches, masked out, which changes no result",
        )
    if renderer.dated:
        yield _finding(
            "dated_template",
            "The chat template writes the current date, so that the same rows give other tokens on another day; for a "
            "repeatable result set dataset.chat_template to a copy with a fixed date",
        )


def _reading_warnings(examples: Examples) -> Iterator[Finding]:
    for reason, count in examples.dropped.items():
        yield Finding(
            code="left_out", message=f"{count:,} {'row' if count == 1 else 'rows'} left out: {reason}", count=count
        )
    for note in examples.notes:
        yield _finding("reading", note)


def _length_errors(
    side: str, rows: Sequence[Example], encoded: EncodedSet, max_length: int | None
) -> Iterator[Finding]:
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


def _length_warnings(side: str, encoded: EncodedSet, max_length: int | None) -> Iterator[Finding]:
    total = len(encoded) + len(encoded.dropped)
    if encoded.dropped and len(encoded):
        yield _finding(
            "too_long",
            f"{side}: {len(encoded.dropped):,} of {total:,} rows are left out, since they are longer than "
            f"training.max_length={max_length} (the longest has {encoded.longest:,} tokens)",
            encoded.dropped,
        )
    if encoded.cut:
        yield _finding(
            "cut",
            f"{side}: {len(encoded.cut):,} of {total:,} rows are longer than training.max_length={max_length} and lose "
            "their later turns",
            encoded.cut,
        )


def _mask_errors(side: str, encoded: EncodedSet) -> Iterator[Finding]:
    if encoded.unended:
        yield _finding(
            "no_end",
            f"{side}: the chat template does not end the assistant's turn with an end token in "
            f"{len(encoded.unended):,} rows, so that a model trained on them would not stop; give a "
            "dataset.chat_template that writes eos_token after the answer",
            encoded.unended,
        )
    if not len(encoded):
        return
    supervised, lengths = encoded.supervised_lengths, encoded.lengths
    if not supervised.any():
        yield _finding("none_supervised", f"{side}: no token of any row is supervised", encoded.ids)
    elif (supervised >= lengths - 1).all():
        yield _finding(
            "all_supervised", f"{side}: every token of every row is supervised: the prompts are empty", encoded.ids
        )


def _mask_warnings(side: str, encoded: EncodedSet) -> Iterator[Finding]:
    if not len(encoded):
        return
    for code, what, where in (
        ("row_none_supervised", "no supervised token", encoded.supervised_lengths == 0),
        ("row_all_supervised", "nothing but supervised tokens", encoded.supervised_lengths >= encoded.lengths - 1),
    ):
        rows = _ids(encoded, where)
        if rows and len(rows) < len(encoded):
            yield _finding(code, f"{side}: {len(rows):,} of {len(encoded):,} rows have {what}", rows)


def _ids(encoded: EncodedSet, where: npt.NDArray[np.bool_]) -> list[str]:
    return [encoded.ids[place] for place in np.flatnonzero(where)]


def _vocabulary_errors(side: str, encoded: EncodedSet, vocab_size: int | None) -> Iterator[Finding]:
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


def _end_text_warnings(side: str, rows: Sequence[Example], renderer: Renderer) -> Iterator[Finding]:
    texts = [renderer.tokenizer.decode([token]) for token in sorted(renderer.end_token_ids)]
    found = [
        row.id
        for row in rows
        if any(
            text and text in turn["content"] for turn in row.messages if turn["role"] == "assistant" for text in texts
        )
    ]
    if found:
        yield _finding(
            "end_token_inside",
            f"{side}: {len(found):,} rows have an end token inside an answer ({', '.join(map(repr, texts))}); what "
            "follows it is not trained",
            found,
        )


def _overlap_warnings(train: Sequence[Example], evaluation: Sequence[Example]) -> Iterator[Finding]:
    prompts = {row.prompt for row in train}
    pairs = {(row.prompt, row.completion) for row in train}
    same = [row.id for row in evaluation if (row.prompt, row.completion) in pairs]
    asked = [row.id for row in evaluation if row.prompt in prompts and (row.prompt, row.completion) not in pairs]
    if same:
        yield _finding(
            "shared_rows",
            f"{len(same):,} of {len(evaluation):,} evaluation rows are training rows too, with the same prompt and "
            "completion: their results show memory; dataset.eval: {split_from: train, rows: ...} keeps equal prompts "
            "on one side",
            same,
        )
    if asked:
        yield _finding(
            "shared_prompts",
            f"{len(asked):,} of {len(evaluation):,} evaluation rows have a prompt that training has too, with another "
            "completion",
            asked,
        )
