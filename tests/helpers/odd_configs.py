"""Mutations of an `adapter_config.json`: odd values, missing and misspelled keys, other types, hostile patterns."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

NAMES: tuple[Any, ...] = (
    "q_proj", ".*q_proj", r"(\w+\.?)+X", "(((((", r"(?!x).*[qv]_proj", r"(?=(\w+\.?)+X).*", "[[:alpha:]]+", "a{,3}",
    "(?P<idx>.)", "ALL-LINEAR", "all-linear", r"(.*)\1", "*", "\\", ["nope"], [""], ["q_proj", None], [["q_proj"]],
    ["lm_head"], ["embed_tokens"], ["."], ["(((("], ["model"], ["layers"], ["norm"], ["mlp", "q_proj"], "x" * 30_000,
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 7, 1.5, 10**12, 10**30, 10**400, float("nan"), float("inf"), -0.0, "", " ", "x",
    "LORA", "../..", "true", "8", "é\u0000", "\ud800", "models:/x@y", "x" * 300, [], [0], [1.5], [-1], [10**12],
    [None], [[]], {}, {"": 1}, {"q_proj": 2}, {"q_proj": 10**12}, {"(((": 2}, {r"(\w+\.?)+X": 2},
    {"embed_tokens": [1, 2]}, {"a": {"b": [1]}}, {"auto_map": {"x": "y.Z"}},
)  # fmt: skip
EXTRA = (
    "auto_map", "unsloth_fixed", "use_new_thing", "unsloth_version", "runtime_config", "lorap_emb_lr", "", "é",
)  # fmt: skip
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def mutations(config: dict[str, Any], seed: int) -> Iterator[tuple[str, bytes]]:
    """Endless mutations with their descriptions; one to three changes each, some of them of the bytes."""
    source = random.Random(seed)
    while True:
        changed, told = dict(config), []
        for _ in range(source.choice((1, 1, 1, 2, 3))):
            key = source.choice((*sorted(config), *EXTRA))
            kind = source.random()
            if kind < 0.08:
                changed.pop(key, None)
                told.append(f"without {key}")
            elif kind < 0.12:
                changed[f"{key}s"] = changed.pop(key, None)
                told.append(f"{key} renamed")
            elif kind < 0.3 or key in _PATTERNS:
                key = source.choice(_PATTERNS) if kind < 0.3 else key
                changed[key] = source.choice(NAMES)
                told.append(f"{key} = {changed[key]!r}"[:80])
            elif kind < 0.35:
                key = source.choice(("rank_pattern", "alpha_pattern"))
                changed[key] = {str(source.choice(NAMES)): source.choice(ODD)}
                told.append(f"{key} = {changed[key]!r}"[:80])
            elif kind < 0.38:
                changed[key] = nested(source.choice((3, 7, 50)))
                told.append(f"{key} nested")
            else:
                changed[key] = source.choice(ODD)
                told.append(f"{key} = {changed[key]!r}"[:80])
        content = json.dumps(changed).encode()
        if source.random() < 0.06:
            content = _damaged(content, source)
            told.append("damaged")
        yield "; ".join(told), content


def _damaged(content: bytes, source: random.Random) -> bytes:
    place = source.randrange(len(content))
    return source.choice(
        (
            content[:place],
            content[:place] + bytes([source.randrange(256)]) + content[place + 1 :],
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\xef\xbb\xbf" + content,
            content.decode().encode("utf-16"),
            b"",
            content + content,
        )
    )
