"""What the project has promised, and what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.engine import way_of
from benchmarks.meter import spread
from benchmarks.peft_loop import WAY

P2 = "P2: SFTTrainer, one base"
_FASTER_THAN_P2 = {1: 3.0, 4: 2.2}
_FASTER_THAN_PLAIN = {1: 2.3, 4: 1.3}
_SWEEP = {1: 0.30, 4: 0.42}
_MEMORY = {1: 1 / 5, 4: 1 / 3}
_TRACKING = 0.01
_HALVING, _WINNERS, _WITHIN = 1 / 8, 0.9, 0.01


@dataclass(frozen=True, kw_only=True)
class Target:
    """One promise.

    Attributes:
        what: In words.
        limit: The number promised.
        measured: The number found; NaN where the equality gate failed.
        at_least: Whether more is better.
        unit: How the numbers are shown: `x` or `%`.
    """

    what: str
    limit: float
    measured: float
    at_least: bool
    unit: str

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def show(self, number: float) -> str:
        if math.isnan(number):
            return "INVALID"
        return f"{number:.2f} x" if self.unit == "x" else f"{number:.1%}"


def targets(units: Mapping[str, Mapping[str, Any]]) -> Iterator[Target]:
    """The promises that the units have numbers for: they were made for SmolLM2 on a CPU."""
    units = {
        name: unit
        for name, unit in units.items()
        if unit["options"]["subject"] == "smollm2" and unit["options"]["device"] == "cpu"
    }
    for micro_batch in sorted({int(unit.rpartition("-")[2]) for unit in units}):
        at = f"micro-batch {micro_batch}"
        yield from _throughput(units.get(f"throughput-{micro_batch}", {}), micro_batch, at)
        yield from _sweep(units.get(f"sweep-{micro_batch}", {}), micro_batch, at)
        yield from _halving(units.get(f"halving-{micro_batch}", {}))
        tracking = units.get(f"tracking-{micro_batch}", {})
        if "share" in tracking:
            yield Target(
                what=f"MLflow's share of the step time, {at}",
                limit=_TRACKING, measured=tracking["share"], at_least=False, unit="%",
            )  # fmt: skip


def speedup(unit: Mapping[str, Any], way: str, against: str, kind: str = "wall") -> float:
    """How many times as many steps a second `way` makes, wall or `cpu`; NaN where one of the two is invalid."""
    ways, gate = unit["ways"], unit["gate"]
    if not (gate[way]["valid"] and gate[against]["valid"]):
        return math.nan
    return spread(ways[against][kind])["median"] / spread(ways[way][kind])["median"]


def extrapolated(unit: Mapping[str, Any]) -> tuple[float, float] | None:
    """Seconds and bytes of P1 for all arms: the mean of the measured ones times their number."""
    singles = unit.get("p1") or []
    if not singles:
        return None
    arms = unit["arms"] / len(singles)
    return arms * sum(each["wall"] for each in singles), arms * sum(each["peak_bytes"] for each in singles)


def _throughput(unit: Mapping[str, Any], micro_batch: int, at: str) -> Iterator[Target]:
    ways = unit.get("ways", {})
    eight, one = way_of(8), way_of(1)
    for way, against, limits in ((eight, P2, _FASTER_THAN_P2), (eight, WAY, _FASTER_THAN_PLAIN)):
        if way in ways and against in ways and micro_batch in limits:
            yield Target(
                what=f"steps of {way} against {against}, {at}",
                limit=limits[micro_batch], measured=speedup(unit, way, against), at_least=True, unit="x",
            )  # fmt: skip
    for against in (P2, WAY):
        if one in ways and against in ways:
            yield Target(
                what=f"steps of {one} against {against}, {at}",
                limit=1.0, measured=speedup(unit, one, against), at_least=True, unit="x",
            )  # fmt: skip


def _sweep(unit: Mapping[str, Any], micro_batch: int, at: str) -> Iterator[Target]:
    p1 = extrapolated(unit)
    if "sweep" not in unit or p1 is None or micro_batch not in _SWEEP:
        return
    seconds, peak = p1
    valid = all(verdict["valid"] for verdict in unit.get("gate", {"": {"valid": False}}).values())
    sweep = unit["sweep"]
    yield Target(
        what=f"time of a short sweep against P1, {at}",
        limit=_SWEEP[micro_batch],
        measured=sweep["registered"] / seconds if valid else math.nan,
        at_least=False, unit="%",
    )  # fmt: skip
    yield Target(
        what=f"peak memory of a pack against as many processes of P1, {at}",
        limit=_MEMORY[micro_batch],
        measured=sweep["peak_bytes"] / peak if valid else math.nan,
        at_least=False, unit="%",
    )  # fmt: skip


def good_winners(winners: Sequence[Mapping[str, Any]]) -> int:
    """Sweeps in which halving found the best arm, or one whose loss is within one percent."""
    return sum(each["same"] or each["loss"] <= (1 + _WITHIN) * each["best"] for each in winners)


def _halving(unit: Mapping[str, Any]) -> Iterator[Target]:
    if "share" in unit:
        yield Target(
            what="time of successive halving over 16 arms against the full grid with P2",
            limit=_HALVING, measured=unit["share"], at_least=False, unit="%",
        )  # fmt: skip
    if "real" in unit:
        yield Target(
            what="loss of the arm that halving finds on SmolLM2, above that of the full grid's best",
            limit=_WITHIN, measured=unit["real"]["loss"] / unit["real"]["best"] - 1, at_least=False, unit="%",
        )  # fmt: skip
    if unit.get("winners"):
        yield Target(
            what=f"sweeps of {len(unit['winners'])} in which halving finds the winner, or one within 1 %",
            limit=_WINNERS, measured=good_winners(unit["winners"]) / len(unit["winners"]), at_least=True, unit="%",
        )  # fmt: skip
