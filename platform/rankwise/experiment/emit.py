"""Plain data as YAML that reads back as the same data. YAML 1.2 includes JSON, so what needs quotes is JSON."""

from __future__ import annotations

import json
import re
from typing import Any

from rankwise.experiment.document import scalar

_BARE = re.compile(r"[A-Za-z_./~][\w ./*+@=%()-]*(?<! )")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff\ud800-\udfff]")


def to_yaml(data: dict[str, Any], depth: int = 0) -> str:
    """Block style for non-empty mappings, flow style for everything inside lists."""
    lines = []
    for key, value in data.items():
        head = f"{'  ' * depth}{_flow(key)}:"
        if isinstance(value, dict) and value:
            lines.append(f"{head}\n{to_yaml(value, depth + 1)}")
        else:
            lines.append(f"{head} {_flow(value)}\n")
    return "".join(lines)


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, str) and _BARE.fullmatch(value) and isinstance(scalar(value), str):
        return value
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    # YAML reads these as line breaks or not at all; JSON's escapes for characters beyond 16 bits are none of YAML's.
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
