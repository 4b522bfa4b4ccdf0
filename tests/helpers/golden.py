"""Golden files: what commands print, with every value masked that may differ between machines or between runs.

A mask keeps keys, order, types and wording, and hides a value:

| mask | hides |
|---|---|
| `<project>` | the project's directory |
| `<id 1>`, `<id 2>`, ... | ids of runs, packs and models, numbered by first occurrence in a document |
| `<digest 1>`, ... | digests of trained or quantized weights; digests in `Masks.known` stay literal |
| `<float>`, `<value>` | a measured number, and one with a standard error |
| `<size>`, `<duration>` | sizes and times with a unit |
| `<time>`, `<host>`, `<pid>`, `<worker>`, `<module>`, `<version>`, `<bytes>` | what their names say |

Integers and settings (`params`, `spec`, `estimates`, ...) stay literal. A multi-line text becomes a list of lines, so
that a changed word is one line of a diff.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from difflib import unified_diff
from pathlib import Path
from typing import Any

UPDATE = "RANKWISE_UPDATE_GOLDEN"
"""Set to 1, tests write the golden files in place of comparing with them."""

SETTINGS = {"params", "spec", "estimates", "lora", "decoding", "limit", "confidence", "config", "signature"}
"""Keys below which numbers are settings and stay as they are."""
MASKED = {
    "host": "<host>",
    "logger": "<module>",
    "pid": "<pid>",
    "worker": "<worker>",
    "timestamp": "<time>",
    "utc_time_created": "<time>",
    "peak_memory_bytes": "<bytes>",
    "rankwise.cpu": "<cpu>",
    "rankwise.gpu": "<gpu>",
    "rankwise.host": "<host>",
    "rankwise.signature.name": "<signature>",
    "mlflow_version": "<version>",
    "python_version": "<version>",
    "model_size_bytes": "<bytes>",
}

_LONG_HEX = re.compile(r"(?<![0-9a-zA-Z.])(?=[0-9a-f]*[0-9])[0-9a-f]{12,64}(?![0-9a-zA-Z])")
_NUMBERS = [
    (re.compile(r"[-+]?[0-9][0-9,]*(\.[0-9]+)?( %)? ± ?[0-9][0-9,]*(\.[0-9]+)?"), "<value>"),
    (re.compile(r"(\| `eval\.[^`]*` \| )[^|]+ \|"), r"\1<float> |"),
    (re.compile(r"[▁-█]+"), "<bars>"),
    (re.compile(r"[0-9][0-9,]*(\.[0-9]+)? ?([kMGT]i?B|bytes)\b"), "<size>"),
    # A size in MiB before one, as in "0 of 19140 MiB".
    (re.compile(r"\b[0-9]+ of <size>"), "<size> of <size>"),
    (re.compile(r"(?<![\w.])[0-9]+(\.[0-9]+)? ?(ms|s)\b"), "<duration>"),
    (re.compile(r"(?<![\w.-])[-+]?[0-9][0-9,]*(\.[0-9]+(e[-+]?[0-9]+)?|e[-+][0-9]+)(?![\w]|\.[0-9])"), "<float>"),
]
_SHORT_ID = re.compile(r"(?<=[>\[])(?=[0-9a-f]*[0-9])[0-9a-f]{8}(?=[<\]])")
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]+)?)?( UTC|Z|\+00:00)?")
_VERSION = re.compile(r"(?<![\w.])[0-9]+(\.[0-9]+){2,}(\+[\w.]+)?")
_TICK = re.compile(r'<path class="(rule|axis)"|<text (x|y)="')
_COORDINATES = re.compile(r'(?<= )(points|d|x|y|cx|cy|x1|x2|y1|y2|r|width|height|transform|data-v)="[^"]*[0-9][^"]*"')


@dataclass
class Masks:
    """What is masked in documents of one project.

    Attributes:
        project: Its directory.
        known: Digests that are the same on every machine.
    """

    project: Path
    known: Collection[str]
    _numbers: dict[str, dict[str, int]] = field(default_factory=dict)

    def document(self, value: Any, *, measured: bool = True) -> Any:
        """A document of JSON, masked; `measured`: floats outside of `SETTINGS` are measurements."""
        self._numbers = {}
        return self._value(value, measured)

    def text(self, text: str, *, measured: bool = True) -> str:
        """A text, masked."""
        self._numbers = {}
        return self._text(text, measured)

    def table(self, text: str) -> str:
        """A table for a terminal, masked; the widths of its columns follow from what is masked, and are dropped."""
        lines = (re.sub(r"([ ━─])\1+", r"\1\1", line).rstrip() for line in self.text(text).splitlines())
        return "\n".join(lines) + "\n"

    def csv(self, text: str) -> str:
        """A table of CSV, masked; its settings (`lora.`, `training.`, ...) stay literal."""
        self._numbers = {}
        head, *rows = csv.reader(io.StringIO(text))
        settings = ("lora.", "training.", "dataset.", "quantization.")
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(head)
        for row in rows:
            assert len(row) == len(head)
            writer.writerow(
                MASKED.get(name) or self._text(cell, measured=not name.startswith(settings))
                for name, cell in zip(head, row, strict=True)
            )
        return out.getvalue()

    def html(self, text: str) -> str:
        """A page, masked, one tag a line. Chart ticks are dropped and coordinates masked: both depend on the data."""
        self._numbers = {}
        out, style = [], False
        for line in re.sub(r">\s*<", ">\n<", text).splitlines():
            style = (style or line.startswith(("<style", "<script"))) and not line.endswith(("</style>", "</script>"))
            if style or line.startswith(("<style", "<script", "<meta")):
                out.append(line)
            elif not _TICK.match(line):
                out.append(self._text(_COORDINATES.sub(r'\1="<n>"', line), measured=True))
        return "\n".join(out) + "\n"

    def _value(self, value: Any, measured: bool, key: str = "") -> Any:
        if isinstance(value, dict):
            return {
                self._text(name, measured=False): self._value(item, measured and name not in SETTINGS, name)
                for name, item in value.items()
            }
        if value is not None and (key in MASKED or key.endswith("_at")):
            return MASKED.get(key, "<time>")
        if isinstance(value, list):
            return [self._value(item, measured) for item in value]
        if isinstance(value, float):
            return "<float>" if measured else value
        if isinstance(value, str) and key.startswith("eval."):
            return "<float>"
        if isinstance(value, str):
            text = self._text(value, measured)
            return ["<lines>", *text.split("\n")] if "\n" in text else text
        return value

    def _text(self, text: str, measured: bool) -> str:
        text = text.replace(str(self.project), "<project>")
        text = _DATE.sub("<time>", text)
        text = _VERSION.sub("<version>", text)
        for pattern, mask in _NUMBERS if measured else ():
            text = pattern.sub(mask, text)
        return _SHORT_ID.sub("<id>", _LONG_HEX.sub(self._hex, text))

    def _hex(self, match: re.Match[str]) -> str:
        digits = match[0]
        if any(known.startswith(digits) for known in self.known):
            return digits
        kind = "digest" if len(digits) == 64 else "id"
        numbers = self._numbers.setdefault(kind, {})
        return f"<{kind} {numbers.setdefault(digits, len(numbers) + 1)}>"


def as_json(document: Any) -> str:
    """A document as golden files have it."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def without(keys: Iterable[str], value: Any, mask: str) -> Any:
    """A document in which the values of some keys are masked, wherever they are."""
    return _each(value, lambda key, item: mask if key in set(keys) and item is not None else item)


def _each(value: Any, change: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _each(change(key, item), change) for key, item in value.items()}
    return [_each(item, change) for item in value] if isinstance(value, list) else value


def compare_with(directory: Path, documents: dict[str, str]) -> list[str]:
    """Compare documents with the golden files of a directory, or write those where `RANKWISE_UPDATE_GOLDEN` is 1.

    Returns:
        A diff for each file that differs, is missing, or belongs to no document.
    """
    if os.environ.get(UPDATE) == "1":
        for path in directory.iterdir():
            if path.is_file():
                path.unlink()
        for name, text in documents.items():
            (directory / name).write_text(text, encoding="utf-8")
        return []
    stored = {path.name: path.read_text(encoding="utf-8") for path in directory.iterdir() if path.is_file()}
    problems = []
    for name in sorted(stored.keys() | documents.keys()):
        old, new = stored.get(name, ""), documents.get(name, "")
        if old != new:
            lines = unified_diff(old.splitlines(), new.splitlines(), f"golden/{name}", f"now/{name}", lineterm="", n=2)
            problems.append("\n".join(lines) or f"golden/{name}: only line ends or blank lines differ")
    return problems
