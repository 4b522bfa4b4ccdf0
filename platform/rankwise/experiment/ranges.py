"""The axes of a search: what a sweep's parameter may range over, in place of a grid's list of values.

| form | values |
|---|---|
| `[2, 4, 8]`, `{choice: [2, 4, 8]}` | these |
| `{uniform: [0, 0.1]}` | numbers, every one as likely |
| `{log_uniform: [1e-4, 1e-2]}` | numbers, every order of magnitude as likely |
| `{int: [2, 64]}`, `{int: [2, 64], log: true}` | whole numbers, both ends included |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rankwise.experiment.document import KeyPath, Problem
from rankwise.experiment.fields import did_you_mean, numbers, show

Kind = Literal["choice", "uniform", "log_uniform", "int"]
KINDS: tuple[Kind, ...] = ("uniform", "log_uniform", "int", "choice")
FORMS = "{uniform: [low, high]}, {log_uniform: [low, high]}, {int: [low, high], log: true} or {choice: [...]}"
# Enough to tell learning rates apart, few enough to be read, compared and repeated by hand.
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One parameter of a search.

    Attributes:
        path: The field, dotted.
        place: Where it stands in the file: `sweep.parameters.PATH`, and `choice` where that is written out.
        kind: How values are drawn.
        low: Smallest value of a range.
        high: Largest value of a range.
        log: Whether a range of whole numbers is drawn by order of magnitude.
        choices: The values of a choice.
    """

    path: str
    place: KeyPath
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def size(self) -> float:
        """How many different values there are; infinity for a range of numbers."""
        if self.kind == "choice":
            return len(self.choices)
        return self.high - self.low + 1 if self.kind == "int" else math.inf

    @property
    def samples(self) -> tuple[tuple[Any, KeyPath], ...]:
        """Values that must be good for all to be, with their places: every choice, both ends of a range."""
        values = self.choices if self.kind == "choice" else (self.low, self.high)
        return tuple((value, (*self.place, index)) for index, value in enumerate(values))

    def rounded(self, value: float) -> float:
        """A drawn number with few digits, still in the range."""
        if self.kind == "int":
            return int(value)
        return min(self.high, max(self.low, float(f"{value:.{DIGITS}g}")))


def read_axis(path: str, value: Any, problems: list[Problem]) -> Axis | None:
    """An axis of a search from what stands in the file, or None with what is wrong added to `problems`.

    The values of a choice are checked elsewhere, as those of a grid are.
    """
    place: KeyPath = ("sweep", "parameters", path)
    if isinstance(value, list):
        return Axis(path=path, place=place, kind="choice", choices=tuple(value))
    if not isinstance(value, dict):
        text = f"must be a list of values, or {FORMS}, got {show(value)}"
        problems.append(Problem(path=place, text=text))
        return None
    unknown = [key for key in value if key not in {*KINDS, "log"}]
    for key in unknown:
        text = f"is no kind of range{did_you_mean(key, KINDS)}; allowed: {', '.join(KINDS)}"
        problems.append(Problem(path=(*place, key), text=text))
    kinds: list[Kind] = [kind for kind in KINDS if kind in value]
    if unknown:
        return None
    if len(kinds) != 1:
        text = f"must have one of {', '.join(KINDS)}, has {' and '.join(kinds) or 'none'}"
        problems.append(Problem(path=place, text=text))
        return None
    (kind,) = kinds
    before = len(problems)
    _check_log(place, kind, value, problems)
    ends = value[kind]
    if kind == "choice":
        return _choice(path, (*place, kind), ends, problems)
    _check_kind(path, place, kind, problems)
    _check_ends((*place, kind), kind, ends, bool(value.get("log")), problems)
    if len(problems) > before:
        return None
    low, high = ends
    return Axis(path=path, place=(*place, kind), kind=kind, low=low, high=high, log=bool(value.get("log")))


def _choice(path: str, place: KeyPath, values: Any, problems: list[Problem]) -> Axis | None:
    if isinstance(values, list):
        return Axis(path=path, place=place, kind="choice", choices=tuple(values))
    problems.append(Problem(path=place, text=f"must be a list of values, got {show(values)}"))
    return None


def _check_log(place: KeyPath, kind: Kind, value: Mapping[str, Any], problems: list[Problem]) -> None:
    if "log" not in value:
        return
    if kind != "int":
        text = f"belongs to int, not to {kind}" + ("; take log_uniform" if kind == "uniform" else "; remove it")
        problems.append(Problem(path=(*place, "log"), text=text))
    elif not isinstance(value["log"], bool):
        problems.append(Problem(path=(*place, "log"), text=f"must be true or false, got {show(value['log'])}"))


def _check_kind(path: str, place: KeyPath, kind: Kind, problems: list[Problem]) -> None:
    holds = numbers().get(path)
    if holds is None:
        text = f"holds no number, so it has no range from low to high; give a list of values, not {kind}"
        problems.append(Problem(path=(*place, kind), text=text))
    elif holds == "integer" and kind != "int":
        logarithmic = ", log: true" if kind == "log_uniform" else ""
        text = f"draws fractions, but {path} is a whole number; did you mean {{int: [low, high]{logarithmic}}}?"
        problems.append(Problem(path=(*place, kind), text=text))


def _check_ends(place: KeyPath, kind: Kind, ends: Any, log: bool, problems: list[Problem]) -> None:
    what = "whole numbers" if kind == "int" else "numbers"
    allowed = int if kind == "int" else (int, float)

    def good(end: Any) -> bool:
        return isinstance(end, allowed) and not isinstance(end, bool) and math.isfinite(end)

    if not isinstance(ends, list) or len(ends) != 2 or not all(map(good, ends)):
        text = f"must be [low, high], two {what}, got {show(ends)}"
    elif ends[0] >= ends[1]:
        text = f"must be [low, high] with low less than high, got {show(ends)}"
    elif (log or kind == "log_uniform") and ends[0] <= 0:
        text = f"must have a low end greater than 0 to be drawn by order of magnitude, got {show(ends)}"
    else:
        return
    problems.append(Problem(path=place, text=text))
