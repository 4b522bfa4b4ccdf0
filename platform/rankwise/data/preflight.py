"""Checks of the data before training, a preview of the supervised tokens, and digests of the prompts trained on.

Errors stop a run, because training would fail or learn nothing. Warnings do not.

The preview shows untrusted text: it is escaped for HTML, and control characters are shown, not sent to the terminal.

`RowDigests` records which prompts an adapter was trained on without storing them, so that promotion needs no training
data. A digest is the first 16 bytes of SHA-256 over a salt and a prompt's key (`rows.row_keys`: everything before an
answer, white space folded, without the definition's system message; a document has one key). A conversation has one
digest for each answer that was learned. Any two of a billion prompts collide with a probability of 2**-69. The salt
prevents looking up the digests of common prompts, and comparing the files of two adapters. It is stored in the file and
derived from the arm, so a retry writes the same bytes. Anyone who can read the file can still test a guessed prompt:
that is its purpose.

The file: a line of JSON (`{"format", "salt", "rows", "digests", "init_from"}`), then the sorted digests, 16 bytes each.
Files of format 1 have one digest for each row, of the prompt of its last answer; they are read alike.
"""

from __future__ import annotations

import hashlib
import html
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Group
from rich.text import Text

from rankwise.data.chat import REASONING, Message, text_of
from rankwise.data.masks import OPEN, Supervise
from rankwise.data.rows import row_keys
from rankwise.data.tokens import Encoded, EncodedSet, kept
from rankwise.exceptions import AssetError, DatasetError

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


PENDING = "\N{REPLACEMENT CHARACTER}"
"""How a tokenizer decodes bytes that are not yet a whole character."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --soft: #656d76; --line: #d0d7de; --on: #1a7f37;
  --fill: #dafbe1; --gap: #eaeef2 }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #8d96a0; --line: #30363d;
  --on: #3fb950; --fill: #12361f; --gap: #21262d } }
body { background: var(--page); color: var(--ink); font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 60rem; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 1.5rem 0 .4rem } .note { color: var(--soft) }
.row { border: 1px solid var(--line); border-radius: 6px; font: 13px/1.9 ui-monospace, monospace; padding: .6rem .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere }
.t { border-radius: 3px; box-shadow: inset 0 0 0 1px var(--gap); color: var(--soft) }
.on { background: var(--fill); border-bottom: 2px solid var(--on); color: var(--ink) }
"""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A text of one token; of several where only together they are whole characters."""

    text: str
    token_ids: tuple[int, ...]
    supervised: bool


def pieces(row: Encoded, tokenizer: Any) -> list[Piece]:
    """Cut a row's text at its tokens."""
    cut: list[Piece] = []
    tokens = [int(token) for token in row.input_ids]
    start = context = 0
    for stop in range(1, len(tokens) + 1):
        # Decoded with the piece before, as some tokenizers drop the space that begins a text.
        before = _decode(tokenizer, tokens[context:start])
        text = _decode(tokenizer, tokens[context:stop])[len(before) :]
        more = stop < len(tokens) and row.supervised[stop] == row.supervised[start]
        if text.endswith(PENDING) and more and stop - start < 4:  # a character has at most 4 bytes
            continue
        cut.append(Piece(text=text, token_ids=tuple(tokens[start:stop]), supervised=bool(row.supervised[start])))
        context, start = start, stop
    return cut


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    if not tokens:
        return ""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def visible(text: str) -> str:
    """The text with control characters as their escapes, line feeds as a sign and a line feed."""
    out = []
    for char in text:
        if char == "\n":
            out.append("↵\n")
        elif char == "\t":
            out.append("⇥")
        elif unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}:
            out.append(char.encode("unicode_escape").decode())
        else:
            out.append(char)
    return "".join(out)


def _title(row: Encoded) -> str:
    return f"row {visible(row.id)}: {len(row.input_ids):,} tokens, {int(row.supervised.sum()):,} supervised"


def render_terminal(rows: Sequence[Encoded], tokenizer: Any) -> Group:
    """The rows for a rich console: supervised text in green between brackets, so that it shows without colours too."""
    texts = []
    for row in rows:
        text = Text(_title(row) + "\n", style="bold")
        for supervised, run in groupby(pieces(row, tokenizer), key=lambda piece: piece.supervised):
            shown = visible("".join(piece.text for piece in run))
            text.append(f"⟦{shown}⟧" if supervised else shown, style="not bold green" if supervised else "not bold dim")
        texts.append(text)
    return Group(*texts)


def render_html(rows: Sequence[Encoded], tokenizer: Any, title: str = "Supervised tokens") -> str:
    """The rows as one HTML page that needs nothing else: every token in its box, its number on hover."""
    body = []
    for row in rows:
        spans = "".join(
            f'<span class="t{" on" if piece.supervised else ""}" title="{" ".join(map(str, piece.token_ids))}">'
            f"{html.escape(visible(piece.text))}</span>"
            for piece in pieces(row, tokenizer)
        )
        body.append(f'<h2>{html.escape(_title(row))}</h2>\n<div class="row">{spans}</div>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        '<p class="note">Each box is a token. <span class="t on">Underlined on green</span>: the loss counts it. '
        '<span class="t">Grey</span>: read, not learned.</p>\n' + "\n".join(body) + "\n</body></html>\n"
    )


FORMAT = 2
DIGEST_BYTES = 16
MANY_ROWS = 1_000_000
"""From this many rows on, the file's size is reported."""


@dataclass(frozen=True, kw_only=True)
class RowDigests:
    """The prompts of one training.

    Attributes:
        salt: Of the digests.
        rows: Rows that there were, equal prompts counted each.
        digests: Of the prompts of all answers.
        init_from: The registered adapter that training started from, whose prompts count too; None for none.
    """

    salt: bytes
    rows: int
    digests: frozenset[bytes]
    init_from: str | None = None

    @classmethod
    def of(cls, keys: Iterable[Sequence[str]], *, name: str, init_from: str | None = None) -> RowDigests:
        """Digest the keys of prompts.

        Args:
            keys: Of each row's prompts, as `rows.row_keys` gives them.
            name: Of the arm; it decides the salt.
            init_from: The registered adapter that training starts from.
        """
        salt = hashlib.sha256(b"rankwise training rows\x00" + name.encode()).digest()[:DIGEST_BYTES]
        rows = list(keys)
        digests = frozenset(_digest(salt, key) for row in rows for key in row)
        return cls(salt=salt, rows=len(rows), digests=digests, init_from=init_from)

    def __contains__(self, key: str) -> bool:
        """Whether a prompt of this key was trained on."""
        return _digest(self.salt, key) in self.digests

    def to_bytes(self) -> bytes:
        """The file; equal prompts and an equal name give equal bytes."""
        header = {
            "format": FORMAT,
            "salt": self.salt.hex(),
            "rows": self.rows,
            "digests": len(self.digests),
            "init_from": self.init_from,
        }
        return json.dumps(header, sort_keys=True).encode() + b"\n" + b"".join(sorted(self.digests))

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> RowDigests:
        """The inverse of `to_bytes`. `where` names the file in messages.

        Raises:
            AssetError: It is not such a file, cut short, or of a newer format.
        """
        head, _, body = content.partition(b"\n")
        try:
            header = json.loads(head)
            if header["format"] > FORMAT:
                raise AssetError(f"{where} has format {header['format']}; this release reads up to {FORMAT}: upgrade")
            salt, rows, count = bytes.fromhex(header["salt"]), int(header["rows"]), int(header["digests"])
            init_from = header["init_from"]
        except (ValueError, KeyError, TypeError) as error:
            raise AssetError(f"{where} is not a file of row digests: {error!r}") from error
        if len(body) != count * DIGEST_BYTES:
            raise AssetError(
                f"{where} has {len(body):,} bytes of digests, expected {count * DIGEST_BYTES:,}: the file is truncated"
            )
        digests = frozenset(body[at : at + DIGEST_BYTES] for at in range(0, len(body), DIGEST_BYTES))
        return cls(salt=salt, rows=rows, digests=digests, init_from=init_from)


def _digest(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode()).digest()[:DIGEST_BYTES]
