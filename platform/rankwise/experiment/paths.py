"""Key paths: where a value stands in the nested mappings of a definition, and how it is read and set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KeyPath = tuple[str | int, ...]


def dotted(path: KeyPath) -> str:
    """A key path as text: `sweep.arms[0].lora.r`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def as_path(field: str) -> KeyPath:
    """The key path of a field that is given as dotted text: `lora.r`."""
    return tuple(field.split("."))


def follow(data: Any, path: KeyPath) -> tuple[int, Any]:
    """Follow a key path through nested mappings as far as it goes.

    Returns:
        How many keys of the path there are, and the value after them. A path that ends early ends at a mapping without
        the next key, or at something that is no mapping.
    """
    for depth, part in enumerate(path):
        if not isinstance(data, Mapping) or part not in data:
            return depth, data
        data = data[part]
    return len(path), data


def put(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set the value at a key path; sections that are missing or null are made on the way."""
    section: Any = data
    for part in path[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
    section[path[-1]] = value
