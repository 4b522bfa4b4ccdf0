"""Key paths: reading and setting values in the nested mappings of a definition."""

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
    """The key path of a dotted field name such as `lora.r`."""
    return tuple(field.split("."))


def follow(data: Any, path: KeyPath) -> tuple[int, Any]:
    """Follow a key path through nested mappings until a key is missing or a value is not a mapping.

    Returns:
        The number of keys that exist, and the value reached.
    """
    for depth, part in enumerate(path):
        if not isinstance(data, Mapping) or part not in data:
            return depth, data
        data = data[part]
    return len(path), data


def put(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set the value at a key path; missing or null sections are created."""
    section: Any = data
    for part in path[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
    section[path[-1]] = value
