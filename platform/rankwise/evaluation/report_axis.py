"""Axes of charts: from values to places, with ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From values to places.

    Attributes:
        title: With its unit.
        low: The smallest value shown.
        high: The largest.
        log: Equal factors are equal lengths; for positive values.
        ticks: Where there are marks; chosen when left out.
        text: How a tick is spelled.
    """

    title: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] | None = None
    text: Callable[[float], str] = lambda value: f"{value:g}"

    def share(self, value: float) -> float:
        """Where a value lies between both ends, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @cached_property
    def marks(self) -> list[float]:
        """The ticks within both ends; of several that are spelled alike (45.0 and 45.2 seconds) the first."""
        wanted = self.ticks if self.ticks is not None else _nice(self.low, self.high, self.log)
        slack = 1e-9 * abs(self.high - self.low)
        within = [tick for tick in wanted if self.low - slack <= tick <= self.high + slack]
        return list({self.text(tick): tick for tick in reversed(within)}.values())[::-1]


def axis(
    title: str,
    values: Sequence[float],
    *,
    log: bool = False,
    ticks: Sequence[float] | None = None,
    text: Callable[[float], str] | None = None,
    room: float = 0.06,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    whole: bool = False,
) -> Axis:
    """An axis that shows all values, with some room at both ends.

    Args:
        title: With its unit.
        values: Finite numbers, at least one.
        log: Equal factors are equal lengths; taken for False where a value is not positive.
        ticks: Where there are marks.
        text: How a tick is spelled.
        room: Share of the length that is left free at either end.
        bounds: What values can be at all: the axis ends there, but for a sliver.
        whole: Only whole numbers are marked.
    """
    low, high = min(values), max(values)
    log = log and low > 0
    if log:
        factor = (high / low) ** room if high > low else 1.5
        low, high = low / factor, high * factor
    else:
        extra = (high - low) * room if high > low else abs(high) * 0.1 or (0.1 if math.isfinite(bounds[1]) else 1.0)
        sliver = 0.02 * (high - low + 2 * extra)
        low, high = max(low - extra, bounds[0] - sliver), min(high + extra, bounds[1] + sliver)
    chosen = None if ticks is None else tuple(ticks)
    if whole:
        chosen = tuple(_nice(low, high, log, whole=True))
    return Axis(title=title, low=low, high=high, log=log, ticks=chosen, text=text or _plain)


def _nice(low: float, high: float, log: bool, *, whole: bool = False) -> list[float]:
    """Ticks at round numbers: about five, on a log axis at 1, 2 and 5 times powers of ten (or at powers alone)."""
    if log and high / low > 3:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1,) if len(decades) > 5 else (1, 2, 5)
        return [factor * 10.0**decade for decade in decades for factor in factors]
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    if whole:
        step = float(max(1, math.ceil(step)))
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _plain(value: float) -> str:
    if value and (abs(value) < 1e-4 or abs(value) >= 1e7):
        mantissa, exponent = f"{value:.2e}".split("e")
        digits = mantissa.rstrip("0").rstrip(".")
        power = "10" + str(int(exponent)).translate(_SUPERSCRIPT)
        return power if digits == "1" else f"{digits}·{power}"
    return f"{value:,.6g}"
