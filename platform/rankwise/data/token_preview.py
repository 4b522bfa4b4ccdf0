"""A preview of rows token by token, for the terminal and as a page: which tokens are supervised.

The preview shows untrusted text: it is escaped for HTML, and control characters are shown, not sent to the terminal.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Group
from rich.text import Text

from rankwise.data.tokens import Encoded

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
