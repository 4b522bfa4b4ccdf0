"""SVG charts without scripts: palette, axes with ticks at round numbers, SVG elements, and a `Chart` with its marks.

A mark may have a tooltip (`<title>`). All texts are escaped. The page's style defines the colours of a `Chart`'s
classes, for light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from html import escape

from markupsafe import Markup

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which colour-blind readers can tell apart."""
# Stops of viridis (matplotlib's, in the public domain): even steps look even, in grey too.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def viridis(share: float) -> str:
    """Return the colour of a share between 0 and 1."""
    position = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(position), len(_VIRIDIS) - 2)
    channels = (
        round(start + (end - start) * (position - low))
        for start, end in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def svg_text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    """Return a text element; `anchor` is `start`, `middle` or `end`."""
    classes = f' class="{style}"' if style else ""
    return f'<text{classes} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg_title(tip: str) -> str:
    """Return the tooltip of a mark; nothing for an empty text."""
    return f"<title>{escape(tip)}</title>" if tip else ""


def svg_figure(title: str, width: float, height: float, shapes: str, *, note: str = "", legend: str = "") -> Markup:
    """Return a drawing with its heading; `shapes` and `legend` are markup."""
    small = f"<small>{escape(note)}</small>" if note else ""
    return Markup(
        f"<figure><figcaption>{escape(title)}{small}</figcaption>"
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{shapes}</svg>'
        f"{legend}</figure>"
    )


@dataclass(frozen=True, kw_only=True)
class ChartAxis:
    """Maps values to positions. `log` needs positive values; without `ticks`, round numbers are chosen."""

    title: str
    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] | None = None
    text: Callable[[float], str] = lambda value: f"{value:g}"

    def share(self, value: float) -> float:
        """Return a value's position between both ends, 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @cached_property
    def marks(self) -> list[float]:
        """The ticks within both ends; of ticks with the same text (45.0 and 45.2 seconds), the first."""
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
) -> ChartAxis:
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
    return ChartAxis(title=title, low=low, high=high, log=log, ticks=chosen, text=text or _plain)


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


COLOURS = 6
"""Classes `c0` to `c5` of the page's style are told apart by colour-blind readers; each has a shape of its own too."""
_SHAPES = ("circle", "square", "triangle", "diamond", "cross", "circle")
_TOP, _RIGHT, _BOTTOM = 14, 14, 44


@dataclass(kw_only=True)
class Chart:
    """One set of axes; marks are drawn in the order of the calls. `note` is shown below the heading."""

    title: str
    x: ChartAxis
    y: ChartAxis
    width: int = 390
    height: int = 280
    note: str = ""
    _marks: list[str] = field(default_factory=list)
    _legend: list[tuple[str, str]] = field(default_factory=list)

    def point(
        self, x: float, y: float, *, colour: int | None = 0, tip: str = "", radius: float = 4.0, style: str = "",
        error: float | None = None, limits: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        """Draw a mark in the shape of its colour, with a bar of `error` to both sides, or between `limits`.

        Colour None is grey. `style` adds the classes `hollow`, `faint` or `ring`. A limit may be infinite.
        """
        at, up = self._place(x, y)
        classes = f"{_colour(colour)} {style}".strip()
        shape = _shape(0 if colour is None else colour, at, up, radius)
        ends = limits if limits is not None else (y - error, y + error) if error else None
        bar = self._bar(at, *ends) if ends is not None else ""
        self._marks.append(f'<g class="m {classes}">{bar}{shape}{svg_title(tip)}</g>')

    def line(
        self, points: Sequence[tuple[float, float]], *, colour: int | None = 0, tip: str = "", style: str = ""
    ) -> None:
        """Draw a line through points; styles `dashed`, `faint`, `step`."""
        if not points:
            return
        places = [self._place(*point) for point in points]
        path = " ".join(f"{at:.1f},{up:.1f}" for at, up in places)
        classes = f"l {_colour(colour)} {style}".strip()
        self._marks.append(f'<polyline class="{classes}" points="{path}">{svg_title(tip)}</polyline>')

    def band(self, low: float, high: float, *, tip: str = "") -> None:
        """Draw a band over the whole width."""
        bottom, top = (self._place(self.x.low, min(max(v, self.y.low), self.y.high))[1] for v in (low, high))
        self._marks.append(
            f'<rect class="band" x="{self._left}" y="{top:.1f}" width="{self._wide}" '
            f'height="{max(0.5, bottom - top):.1f}">{svg_title(tip)}</rect>'
        )

    def level(self, value: float, *, tip: str = "") -> None:
        """Draw a dashed grey line over the whole width."""
        self.line([(self.x.low, value), (self.x.high, value)], colour=None, style="dashed", tip=tip)

    def legend(self, label: str, colour: int | None = 0, style: str = "") -> None:
        """Add an entry to the legend below the chart."""
        entry = (label, f"{_colour(colour)} {style}".strip())
        if entry not in self._legend:
            self._legend.append(entry)

    def draw(self) -> Markup:
        """Return the figure."""
        keys = "".join(
            f'<li><svg viewBox="0 0 16 12" class="key" aria-hidden="true"><g class="m {classes}">'
            f"{_shape(_number(classes), 8, 6, 4)}</g></svg>{escape(label)}</li>"
            for label, classes in self._legend
        )
        legend = f'<ul class="legend">{keys}</ul>' if keys else ""
        shapes = self._frame() + "".join(self._marks)
        return svg_figure(self.title, self.width, self.height, shapes, note=self.note, legend=legend)

    @cached_property
    def _left(self) -> int:
        longest = max((len(self.y.text(tick)) for tick in self.y.marks), default=1)
        return 30 + round(6.6 * longest)

    @property
    def _wide(self) -> int:
        return self.width - self._left - _RIGHT

    @property
    def _high(self) -> int:
        return self.height - _TOP - _BOTTOM

    def _place(self, x: float, y: float) -> tuple[float, float]:
        return self._left + self._wide * self.x.share(x), _TOP + self._high * (1 - self.y.share(y))

    def _bar(self, at: float, low: float, high: float) -> str:
        """A bar between two values; an end beyond the axis has no cap."""
        ends = [min(max(value, self.y.low), self.y.high) for value in (high, low)]
        top, bottom = (self._place(self.x.low, end)[1] for end in ends)
        shown = [up for up, end, value in zip((top, bottom), ends, (high, low), strict=True) if end == value]
        caps = "".join(f"M{at - 3:.1f},{up:.1f}h6" for up in shown)
        return f'<path class="e" d="M{at:.1f},{top:.1f}V{bottom:.1f}{caps}"/>'

    def _frame(self) -> str:
        left, bottom = self._left, _TOP + self._high
        parts = []
        for tick in self.y.marks:
            up = self._place(self.x.low, tick)[1]
            parts.append(f'<path class="rule" d="M{left},{up:.1f}h{self._wide}"/>')
            parts.append(svg_text(left - 6, up + 4, self.y.text(tick), "end"))
        last = -math.inf
        for tick in self.x.marks:
            at, text = self._place(tick, self.y.low)[0], self.x.text(tick)
            parts.append(f'<path class="axis" d="M{at:.1f},{bottom}v4"/>')
            if at - last > 3.4 * (len(text) + 2):  # Labels that would touch are left out.
                parts.append(svg_text(at, bottom + 17, text, "middle"))
                last = at + 3.4 * len(text)
        parts.append(f'<path class="axis" d="M{left},{bottom}h{self._wide}"/>')
        parts.append(svg_text(left + self._wide / 2, self.height - 8, self.x.title, "middle", "t"))
        middle = _TOP + self._high / 2
        parts.append(
            f'<text class="t" transform="translate(13,{middle:.0f}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y.title)}</text>"
        )
        return "".join(parts)


def shorten(label: str, limit: int = 60) -> str:
    """Shorten a label to fit into a legend."""
    return label if len(label) <= limit else label[: limit - 1] + "…"


def _colour(colour: int | None) -> str:
    return "cx" if colour is None else f"c{colour % COLOURS}"


def _number(classes: str) -> int:
    first = classes.split()[0][1:]
    return int(first) if first.isdecimal() else 0


def _shape(colour: int, at: float, up: float, radius: float) -> str:
    shape, r = _SHAPES[colour % COLOURS], radius
    if shape == "square":
        return f'<rect x="{at - r:.1f}" y="{up - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"/>'
    if shape == "triangle":
        return f'<path d="M{at:.1f},{up - 1.2 * r:.1f}l{1.2 * r:.1f},{2.1 * r:.1f}h{-2.4 * r:.1f}z"/>'
    if shape == "diamond":
        r *= 1.3
        return f'<path d="M{at:.1f},{up - r:.1f}l{r:.1f},{r:.1f}l{-r:.1f},{r:.1f}l{-r:.1f},{-r:.1f}z"/>'
    if shape == "cross":
        return f'<path d="M{at - r:.1f},{up - r:.1f}l{2 * r:.1f},{2 * r:.1f}m0,{-2 * r:.1f}l{-2 * r:.1f},{2 * r:.1f}"/>'
    return f'<circle cx="{at:.1f}" cy="{up:.1f}" r="{r:.1f}"/>'
