"""Plots of an adapter's anatomy as SVG: small enough to be logged with every arm, drawn without scripts or a network.

A script library in the page would be 4.7 MB an arm; these are some tens of kilobytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from rankwise.experiment.module_names import layer_of
from rankwise.modeling.anatomy import Anatomy, Target
from rankwise.modeling.anatomy_rank import ENERGY, kept_energy
from rankwise.modeling.anatomy_tree import decimal_bytes, kind_of

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Stops of viridis (matplotlib's, in the public domain): even steps look even, in grey too.
_VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_WIDTH, _LEFT, _CELL = 980, 190, 22
_PLOT_HEIGHT = 260


def heat_map(
    anatomy: Anatomy, title: str, value: Callable[[Target], float | None], show: Callable[[Target], str]
) -> str:
    """A map with a row for each kind of module and a column for each layer; flagged modules have a red frame.

    Args:
        anatomy: What to draw.
        title: Its heading.
        value: What decides on a cell's colour; None or NaN leaves it grey.
        show: What a cell says when the pointer rests on it.
    """
    kinds = list(dict.fromkeys(kind_of(target.module) for target in anatomy.targets))
    layers = list(dict.fromkeys(layer_of(target.module) for target in anatomy.targets))
    width = min(_CELL, (_WIDTH - _LEFT) / len(layers))
    numbers = [number for target in anatomy.targets if _drawn(number := value(target))]
    top = max((number for number in numbers if number is not None), default=0.0)
    cells = []
    for target in anatomy.targets:
        column, row, number = layers.index(layer_of(target.module)), kinds.index(kind_of(target.module)), value(target)
        fill = _colour(number / top if top else 0.0) if number is not None and _drawn(number) else "#ddd"
        frame = ' stroke="#d00" stroke-width="2"' if target.flags else ""
        cells.append(
            f'<rect x="{_LEFT + column * width:.1f}" y="{24 + row * _CELL}" width="{width - 1:.1f}" '
            f'height="{_CELL - 1}" fill="{fill}"{frame}><title>{escape(show(target))}</title></rect>'
        )
    rows = [_text(_LEFT - 6, 24 + row * _CELL + 15, kind, "end") for row, kind in enumerate(kinds)]
    every = max(1, math.ceil(24 / width))
    bottom = 24 + len(kinds) * _CELL
    columns = [
        _text(_LEFT + (index + 0.5) * width, bottom + 14, "-" if layer is None else str(layer), "middle")
        for index, layer in enumerate(layers)
        if index % every == 0
    ]
    return _svg(title, bottom + 56, [*cells, *rows, *columns, *_legend(bottom + 28, top)])


def energy_plot(anatomy: Anatomy, title: str) -> str:
    """How much of the deltas' energy (squared norm) their best approximations of rank 1, 2, ... keep.

    One line for each kind of module, over all its layers together, and a dashed one at 99 %. Empty where nothing was
    learned.
    """
    energies: dict[str, list[float]] = {}
    for target in anatomy.targets:
        if target.flags or not target.singular_values:
            continue
        pooled = energies.setdefault(kind_of(target.module), [])
        pooled += [0.0] * (len(target.singular_values) - len(pooled))
        for k, number in enumerate(target.singular_values):
            pooled[k] += number * number
    if not energies:
        return ""
    longest = max(len(energy) for energy in energies.values())
    right = _WIDTH - 240

    def at(k: int, share: float) -> tuple[float, float]:
        return _LEFT + (right - _LEFT) * ((k - 1) / max(1, longest - 1)), 24 + _PLOT_HEIGHT * (1 - share)

    shapes = [_line(at(1, share), at(longest, share), "#ddd") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    shapes += [_text(_LEFT - 6, at(1, share)[1] + 4, f"{share:.0%}", "end") for share in (0.0, 0.5, 1.0)]
    shapes.append(_line(at(1, ENERGY), at(longest, ENERGY), "#d00", dashed=True))
    every = max(1, math.ceil(longest / 16))
    ticks = sorted({1, longest, *range(every, longest - every // 2, every)})
    shapes += [_text(at(k, 0)[0], 24 + _PLOT_HEIGHT + 16, str(k), "middle") for k in ticks]
    shapes.append(_text((_LEFT + right) / 2, 24 + _PLOT_HEIGHT + 34, "rank", "middle"))
    for index, (kind, energy) in enumerate(energies.items()):
        colour, y = _COLOURS[index % len(_COLOURS)], 34 + 18 * index
        kept = kept_energy(energy)
        points = " ".join("{:.1f},{:.1f}".format(*at(k, share)) for k, share in enumerate(kept, start=1))
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [
            f'<circle cx="{x:.1f}" cy="{y0:.1f}" r="3" fill="{colour}">'
            f"<title>{escape(f'{kind}: rank {k} keeps {share:.2%}')}</title></circle>"
            for k, share in enumerate(kept, start=1)
            for x, y0 in [at(k, share)]
        ]
        shapes.append(_line((right + 20, y - 4), (right + 40, y - 4), colour))
        shapes.append(_text(right + 46, y, kind, "start"))
    return _svg(title, _PLOT_HEIGHT + 66, shapes)


def bars(title: str, sizes: Mapping[str, int]) -> str:
    """Sizes in bytes as horizontal bars."""
    top = max(sizes.values())
    shapes = []
    for index, (name, count) in enumerate(sizes.items()):
        y, length = 24 + index * 26, (_WIDTH - _LEFT - 180) * count / top
        shapes.append(_text(_LEFT + 14, y + 15, name, "end"))
        shapes.append(
            f'<rect x="{_LEFT + 20}" y="{y}" width="{max(1.0, length):.1f}" height="20" fill="{_COLOURS[0]}"/>'
        )
        shapes.append(_text(_LEFT + 26 + length, y + 15, decimal_bytes(count), "start"))
    return _svg(title, 30 + 26 * len(sizes), shapes)


def _svg(title: str, height: float, shapes: Sequence[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(shapes)}</svg></figure>'
    )


def _legend(y: float, top: float) -> list[str]:
    steps = 40
    strip = [
        f'<rect x="{_LEFT + index * 5}" y="{y}" width="5.5" height="10" fill="{_colour(index / (steps - 1))}"/>'
        for index in range(steps)
    ]
    return [
        *strip,
        _text(_LEFT, y + 24, "0", "start"),
        _text(_LEFT + steps * 5, y + 24, f"{top:.3g}", "end"),
        _text(_LEFT + steps * 5 + 20, y + 10, "layers from left to right; red frame: see the remarks above", "start"),
    ]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(start: tuple[float, float], end: tuple[float, float], colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}" stroke="{colour}" '
        f'stroke-width="1.5"{dash}/>'
    )


def _drawn(number: float | None) -> bool:
    return number is not None and math.isfinite(number)


def _colour(share: float) -> str:
    """Of a share between 0 and 1."""
    position = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    low = min(int(position), len(_VIRIDIS) - 2)
    channels = (
        round(start + (end - start) * (position - low))
        for start, end in zip(_VIRIDIS[low], _VIRIDIS[low + 1], strict=True)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)
