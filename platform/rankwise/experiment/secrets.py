"""Secrets do not belong into a definition: it is stored in the queue, in MLflow, and in the model's card."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rankwise.experiment.document import Document, KeyPath, Problem
from rankwise.redact import holds_secret

_ADVICE = (
    "holds what looks like a secret (a token, a private key, or a URL with a password), and definitions are stored in "
    "the queue and in MLflow; take it out, and give it in the environment (HF_TOKEN, ~/.netrc, pip's configuration)"
)


def secrets_in(document: Document) -> list[Problem]:
    """A problem for each value that holds a secret; the message does not repeat it."""
    return [Problem(path=path, text=_ADVICE) for path, text in _texts(document.data, ()) if holds_secret(text)]


def _texts(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, (*path, index))
