"""Part `throughput`: seconds of one step of one arm, the ways alternating in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.bench import Bench
from benchmarks.blocks import Block, Samples
from benchmarks.engine import train_packed, way_of
from benchmarks.gate import Gate
from benchmarks.meter import spread
from benchmarks.peft_loop import WAY, start_values, train_plainly
from benchmarks.subjects import Workload
from rankwise.experiment.arm import ArmSpec

# Arms that the ways for single arms train in turn, so that their ranks are mixed as a pack's are.
_TURNS = (1, 0, 3, 2)


def measure(bench: Bench, micro_batch: int, save: Callable[[dict[str, Any]], None]) -> None:
    """Alternate all ways for some rounds; what is there is saved after each."""
    options = bench.options
    workload = bench.workload(micro_batch, steps=options.steps)
    gate = bench.gate()
    samples: dict[str, Samples] = {}
    took: dict[str, float] = {}
    for turn in range(options.rounds):
        blocks = _blocks(bench, workload, turn)
        # Backwards every second time, so that a machine that slows down does not always slow down the same.
        for way, run in blocks if turn % 2 == 0 else reversed(blocks):
            bench.check_time(took.get(way, 0.0))
            began = time.monotonic()
            block = run()
            took[way] = time.monotonic() - began
            samples.setdefault(block.way, Samples(arms=block.arms)).add(block)
            gate.add(block.way, block.losses)
            each = spread([value / block.arms for value in block.wall])
            cpu = spread([value / block.arms for value in block.cpu])
            bench.say(
                f"micro-batch {micro_batch}, round {turn + 1} of {options.rounds}: {block.way}: "
                f"{each['median']:.3f} s a step of an arm, {cpu['median']:.3f} s CPU"
            )
        save(_result(workload, samples, gate, turn + 1 == options.rounds))


def _result(workload: Workload, samples: dict[str, Samples], gate: Gate, complete: bool) -> dict[str, Any]:
    return {
        "complete": complete,
        "tokens": workload.tokens,
        "steps": workload.arms[0].training.max_steps,
        "tolerance": gate.tolerance,
        "rounding": gate.rounding,
        "ways": {way: values.to_json() for way, values in samples.items()},
        "gate": gate.verdicts(),
    }


def _blocks(bench: Bench, workload: Workload, turn: int) -> list[tuple[str, Callable[[], Block]]]:
    options = bench.options
    sweep = workload.arms[: options.sweep_arms]
    singles = sweep if options.full else (sweep[_TURNS[turn % len(_TURNS)] % len(sweep)],)
    blocks: list[tuple[str, Callable[[], Block]]] = []
    for arm in singles:
        blocks += _single(bench, workload, arm)
    for size in options.packs:
        if size > options.sweep_arms and turn % 2:
            continue  # The largest packs take as long as all the rest together.
        for arms in [[arm] for arm in singles] if size == 1 else [list(workload.arms[:size])]:
            blocks.append((way_of(size), partial(train_packed, workload, bench.base, arms)))
    return blocks


def _single(bench: Bench, workload: Workload, arm: ArmSpec) -> list[tuple[str, Callable[[], Block]]]:
    """The ways that know one arm at a time."""
    start = start_values(bench.base, arm)
    blocks: list[tuple[str, Callable[[], Block]]] = [
        (WAY, partial(train_plainly, workload, bench.reference, arm, start))
    ]
    if bench.options.trl:
        from benchmarks.trl_arms import P2, P2_PLAIN, describe, train_over_loaded_base

        described = describe(workload, bench.base, arm, start, workload.definition.parent / "trl")
        for way, checkpointing in ((P2, True), (P2_PLAIN, False)):
            train = partial(train_over_loaded_base, arm, described, bench.reference, checkpointing=checkpointing)
            blocks.append((way, train))
    return blocks
