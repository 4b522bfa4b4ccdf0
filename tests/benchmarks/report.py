"""The numbers as Markdown, for people and for the README."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.meter import spread
from benchmarks.targets import extrapolated, good_winners, speedup, targets

_NOTES = (
    "Ways: *plain peft loop*: peft, AdamW and a loop. *P2*: TRL's `SFTTrainer` with its defaults (gradient "
    "checkpointing on), one arm after another over one base; below it the same without checkpointing. *P1*: the same "
    "trainer, a new process for each arm. *pack of n*: this engine. All train the same rows in the same order from the "
    "same start values in the same dtype, without dropout, adapters in fp32. A way whose losses differ by more than "
    "{tolerance:.0e} (and by {rounding:.0e} nats against TRL, whose loss rounds in another way than torch's) is "
    "INVALID. Numbers are medians (smallest to largest) of all steps but the first of each block; the ways alternate."
)


def markdown(units: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole report."""
    lines: list[str] = []
    for unit in (unit for name, unit in units.items() if name.startswith("throughput")):
        lines += [*_throughput(unit), ""]
    sweeps = {name: unit for name, unit in units.items() if name.startswith("sweep") and "sweep" in unit}
    if sweeps:
        lines += [*_sweeps(sweeps), ""]
    for unit in (unit for name, unit in units.items() if name.startswith("halving")):
        lines += [_halving(unit), ""]
    if promised := list(targets(units)):
        lines += _table(
            ["promise", "limit", "measured", "met"],
            [
                [
                    each.what,
                    f"{'at least' if each.at_least else 'at most'} {each.show(each.limit)}",
                    each.show(each.measured),
                    "yes" if each.met else "**no**",
                ]
                for each in promised
            ],
        )
        lines.append("")
    gated = [unit for unit in units.values() if "tolerance" in unit]
    if gated:
        lines += [_NOTES.format(tolerance=gated[0]["tolerance"], rounding=gated[0]["rounding"]), ""]
    lines.append(_machine(units))
    return "\n".join(lines) + "\n"


def invalid(units: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What did not pass the equality gate, one line each."""
    return [
        f"{name}: {way}: losses differ by {verdict['difference']:.1e} ({verdict['losses']} compared); allowed are "
        f"{unit['tolerance']:.0e} and {unit['rounding']:.0e} nats against TRL"
        for name, unit in units.items()
        for way, verdict in unit.get("gate", {}).items()
        if not verdict["valid"]
    ]


def _throughput(unit: Mapping[str, Any]) -> Iterator[str]:
    micro_batch = unit["unit"].rpartition("-")[2]
    ways: Mapping[str, Any] = unit["ways"]
    p2 = next((way for way in ways if way.startswith("P2: ")), None)
    plain = next((way for way in ways if way.startswith("plain")), None)
    gpu = any(values["peak_bytes"] for values in ways.values())
    yield (
        f"**One step of one arm, micro-batch {micro_batch}** (rows of {unit['tokens']:.0f} tokens"
        f"{'' if unit['complete'] else '; not all rounds were measured'})"
    )
    yield ""
    rows = []
    for way, values in ways.items():
        verdict = unit["gate"][way]
        row = [way, _seconds(values["wall"]), _seconds(values["cpu"])]
        row += [_against(unit, way, against) for against in (p2, plain)]
        if gpu:
            row.append(f"{values['peak_bytes'] / 1e9:.1f} GB")
        rows.append([*row, f"{verdict['difference']:.0e}" if verdict["valid"] else "**INVALID**"])
    memory = ["peak memory"] if gpu else []
    yield from _table(
        ["", "seconds", "CPU seconds", "against P2 (CPU)", "against plain (CPU)", *memory, "losses differ by"], rows
    )


def _sweeps(units: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    first = next(iter(units.values()))
    yield f"**A sweep of {first['arms']} arms and {first['steps']} steps, from the command to the last adapter**"
    yield ""
    rows = []
    for name, unit in units.items():
        micro_batch = name.rpartition("-")[2]
        sweep = unit["sweep"]
        rows.append(
            [
                f"`rankwise run --max-arms {unit['arms']}`", micro_batch,
                f"{sweep['registered']:.0f} s (all registered; with evaluation and comparison {sweep['wall']:.0f} s)",
                f"{sweep['cpu']:.0f} s", f"{sweep['peak_bytes'] / 1e9:.2f} GB",
            ]
        )  # fmt: skip
        if (p1 := extrapolated(unit)) is not None:
            singles = unit["p1"]
            walls = [each["wall"] for each in singles]
            measured = f"{len(singles)} of {unit['arms']} arms measured, {min(walls):.0f} to {max(walls):.0f} s each"
            note = measured if len(singles) < unit["arms"] else "all arms measured"
            cpu = unit["arms"] / len(singles) * sum(each["cpu"] for each in singles)
            rows.append(
                [f"P1, {unit['arms']} processes", micro_batch, f"{p1[0]:.0f} s ({note})", f"{cpu:.0f} s",
                 f"{p1[1] / 1e9:.2f} GB"]
            )  # fmt: skip
    yield from _table(["", "micro-batch", "time", "CPU time", "peak memory"], rows)


def _halving(unit: Mapping[str, Any]) -> str:
    winners = unit["winners"]
    text = f"**Successive halving over {unit['arms']} arms.**"
    if winners:
        text += (
            f" In {good_winners(winners)} of {len(winners)} sweeps over a small base it finds the winner of the full "
            f"grid or one within 1 % of its loss (the winner itself in {sum(each['same'] for each in winners)}), with "
            f"{winners[0]['steps']:,} of {winners[0]['full_steps']:,} steps."
        )
    if (real := unit.get("real")) is not None:
        text += (
            f" On the base of the tables, micro-batch 1 and {real['full_steps'] // unit['arms']} steps, it takes "
            f"{real['seconds']:.0f} s"
        )
        text += (
            " and finds the winner."
            if real["same"]
            else f" and finds an arm with loss {real['loss']:.4f}; the best has {real['best']:.4f}."
        )
    if "share" in unit:
        text += f" The full grid with P2, {unit['p2_step']:.2f} s a step, takes {1 / unit['share']:.1f} times as long."
    return text


def _machine(units: Mapping[str, Mapping[str, Any]]) -> str:
    last = max(units.values(), key=lambda unit: unit["when"])
    loads = [unit["machine"]["load"] for unit in units.values()]
    where, options = last["machine"], last["options"]
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return (
        f"{options['subject']} on {where['device']}, {where['cores']} cores, {where['threads']} threads, "
        f"{last['when'][:10]}; load of the machine when the parts ended {min(loads):.1f} to {max(loads):.1f}; "
        f"{versions}."
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _seconds(values: Sequence[float]) -> str:
    found = spread(values)
    return f"{found['median']:.3g} ({found['min']:.3g} to {found['max']:.3g})"


def _against(unit: Mapping[str, Any], way: str, against: str | None) -> str:
    """How many times as fast, by wall time and by CPU time."""
    if against is None or math.isnan(speed := speedup(unit, way, against)):
        return ""
    return f"{speed:.2f} x ({speedup(unit, way, against, 'cpu'):.2f})"
