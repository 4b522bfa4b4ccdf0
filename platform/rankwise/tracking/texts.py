"""Texts as every store takes them."""

from __future__ import annotations

from rankwise.redact import redact


def storable(text: str) -> str:
    """The text without secrets, NUL and halves of surrogate pairs, which are written as escapes.

    PostgreSQL has no NUL in texts. A half of a pair (of a file's name that is no UTF-8, say) has no encoding: the store
    would fail at every attempt, as if it were away, and hold up all that the run has to say after it.
    """
    return encoded(redact(text)).decode().replace("\0", "\\x00")


def encoded(text: str) -> bytes:
    """The text as UTF-8, halves of surrogate pairs as escapes."""
    return text.encode(errors="backslashreplace")
