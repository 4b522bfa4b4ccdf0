"""The numbers as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.meter import spread
from benchmarks.targets import extrapolated

_COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f")


def draw(units: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Steps a second by the size of packs, and the short sweep beside P1."""
    speeds = {name: unit for name, unit in units.items() if name.startswith("throughput")}
    sweeps = {name: unit for name, unit in units.items() if name.startswith("sweep") and "sweep" in unit}
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        for colour, (name, unit) in zip(_COLOURS, speeds.items(), strict=False):
            _draw_speed(left, unit, name.rpartition("-")[2], colour)
        left.set(xscale="log", xlabel="arms in a pack", ylabel="steps of an arm a second", ylim=(0, None))
        sizes = sorted({ways["arms"] for unit in speeds.values() for ways in unit["ways"].values()})
        left.set_xticks(sizes, [str(size) for size in sizes])
        left.minorticks_off()
        if speeds:
            left.legend(frameon=False, fontsize=8)
        _draw_sweeps(right, sweeps)
        figure.savefig(path, dpi=150)


def _draw_speed(axes: Any, unit: Mapping[str, Any], micro_batch: str, colour: str) -> None:
    packs, others = [], []
    for way, values in unit["ways"].items():
        if unit["gate"][way]["valid"]:
            (packs if way.startswith("pack") else others).append((values["arms"], way, spread(values["wall"])))
    packs.sort()
    middle = [1 / seconds["median"] for _, _, seconds in packs]
    low = [value - 1 / seconds["max"] for value, (_, _, seconds) in zip(middle, packs, strict=True)]
    high = [1 / seconds["min"] - value for value, (_, _, seconds) in zip(middle, packs, strict=True)]
    axes.errorbar(
        [arms for arms, _, _ in packs], middle, yerr=[low, high], marker="o", capsize=3, color=colour,
        label=f"packs, micro-batch {micro_batch}",
    )  # fmt: skip
    for style, (_, way, seconds) in zip(("--", ":", "-."), others, strict=False):
        label = f"{way.partition(':')[0]}, micro-batch {micro_batch}"
        axes.axhline(1 / seconds["median"], color=colour, linestyle=style, linewidth=1, label=label)


def _draw_sweeps(axes: Any, sweeps: Mapping[str, Mapping[str, Any]]) -> None:
    names, times, colours, memories = [], [], [], []
    for name, unit in sweeps.items():
        micro_batch = name.rpartition("-")[2]
        if (p1 := extrapolated(unit)) is not None:
            names.append(f"P1, micro-batch {micro_batch}")
            times.append(p1[0])
            memories.append(p1[1])
            colours.append("#b9b9b9")
        names.append(f"one pack, micro-batch {micro_batch}")
        times.append(unit["sweep"]["registered"])
        memories.append(unit["sweep"]["peak_bytes"])
        colours.append(_COLOURS[0])
    if not names:
        axes.set_axis_off()
        return
    bars = axes.barh(names[::-1], times[::-1], color=colours[::-1])
    axes.bar_label(bars, [f" {t:.0f} s, {m / 1e9:.1f} GB" for t, m in zip(times[::-1], memories[::-1], strict=True)])
    axes.set(xlabel="seconds of a short sweep", xlim=(0, 1.35 * max(times)))
