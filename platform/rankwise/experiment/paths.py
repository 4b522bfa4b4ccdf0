"""Key paths: reading and setting values in the nested mappings of a definition."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

KeyPath = tuple[str | int, ...]
_PLACE = re.compile(r"([^\[\]]+)((?:\[\d{1,4}\])*)")


def dotted(path: KeyPath) -> str:
    """A key path as text: `sweep.arms[0].lora.r`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def as_path(field: str) -> KeyPath:
    """The key path of a dotted field name such as `lora.r` or `dataset.train[0].weight`."""
    path: list[str | int] = []
    for part in field.split("."):
        match = _PLACE.fullmatch(part)
        path.append(part if match is None else match[1])
        if match is not None and match[2]:
            path += [int(place) for place in match[2][1:-1].split("][")]
    return tuple(path)


def has(data: Any, part: str | int) -> bool:
    """Whether a mapping has a key, or a list a place."""
    if isinstance(part, int):
        return isinstance(data, list) and part < len(data)
    return isinstance(data, Mapping) and part in data


def follow(data: Any, path: KeyPath) -> tuple[int, Any]:
    """Follow a key path through nested mappings and lists until a key or place is missing.

    Returns:
        The number of keys that exist, and the value reached.
    """
    for depth, part in enumerate(path):
        if not has(data, part):
            return depth, data
        data = data[part]
    return len(path), data


def put(data: dict[str, Any], path: KeyPath, value: Any) -> None:
    """Set the value at a key path; missing or null sections are created, places in lists must exist."""
    section: Any = data
    for part in path[:-1]:
        if isinstance(section, dict) and section.get(part) is None:
            section[part] = {}
        section = section[part]
    section[path[-1]] = value
