"""The hash of settings: SHA-256 over canonical JSON, equal for equal settings however they are spelled."""

from __future__ import annotations

from typing import Any

from rankwise.digests import canonical_json, content_digest


def plain(value: Any) -> Any:
    """Plain JSON data with one spelling per value: 16.0 becomes 16, a tuple becomes a list."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def digest(value: Any) -> str:
    """SHA-256 (64 hex digits) over the canonical JSON of plain data."""
    return content_digest(canonical_json(plain(value), allow_nan=False)).removeprefix("sha256:")
