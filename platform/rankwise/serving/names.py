"""Names of adapters as requests give them."""

from __future__ import annotations

import re

_URI = re.compile(r"models:/[^/@:]+(?:@[\w-]+|/[0-9]+)")
_SHORT = re.compile(r"[^/@:\s]+@[\w-]+")


def model_uri(name: str) -> str | None:
    """`models:/NAME@ALIAS` and `models:/NAME/VERSION` as they are, `NAME@ALIAS` as such a URI; None for others."""
    if _URI.fullmatch(name):
        return name
    return f"models:/{name}" if _SHORT.fullmatch(name) else None
