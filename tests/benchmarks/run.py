"""Measure parts one after another; what is there is written after each."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import early_stopping, short_sweep, throughput, tracking_share
from benchmarks.bench import Bench, Options, OutOfTime
from benchmarks.plot import draw
from benchmarks.report import invalid, markdown
from benchmarks.results import Results
from rankwise.files import write_atomically
from rankwise.settings import Settings

Measure = Callable[[Bench, int, Callable[[dict[str, Any]], None]], None]

PARTS: dict[str, Measure] = {
    "throughput": throughput.measure,
    "sweep": short_sweep.measure,
    "tracking": tracking_share.measure,
    "halving": early_stopping.measure,
}
_ONCE = {"halving"}
"""Parts that have no table for each micro-batch."""


def run(
    options: Options,
    parts: Sequence[str],
    out: Path,
    settings: Settings,
    say: Callable[[str], None],
    *,
    resume: bool = False,
) -> list[str]:
    """Measure and report.

    Args:
        options: What to measure.
        parts: Keys of `PARTS`.
        out: Where `parts/*.json`, `report.md`, `plot.png` and `logs/` go. Other parts' numbers stay there.
        settings: Where the caches are.
        say: Told of what goes on.
        resume: Keep what was measured to its end with the same options.

    Returns:
        What went wrong, one line each: pairs that did not compute the same, parts that were left out or failed.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    bench = Bench(options=options, out=out, settings=settings, say=say)
    results = Results(out, options)
    measured, problems = [], []
    try:
        # The micro-batches one after another: with too little time the first table is whole.
        for unit, part, micro_batch in _units(options, parts):
            if resume and results.is_complete(unit):
                say(f"{unit}: measured before")
                measured.append(unit)
                continue
            say(f"{unit} ...")
            try:
                PARTS[part](bench, micro_batch, lambda data, unit=unit: results.save(unit, data))
                measured.append(unit)
            except OutOfTime as error:
                problems.append(f"{unit}: not measured to its end: {error}")
                say(problems[-1])
            except short_sweep.CommandFailed as error:
                problems.append(f"{unit}: {error}")
                say(problems[-1])
            _report(results)
    finally:
        shutil.rmtree(bench.scratch, ignore_errors=True)
    return [*problems, *invalid({unit: data for unit, data in results.read().items() if unit in measured})]


def _units(options: Options, parts: Sequence[str]) -> list[tuple[str, str, int]]:
    each = [(f"{part}-{size}", part, size) for size in options.micro_batches for part in parts if part not in _ONCE]
    return [*each, *((f"{part}-1", part, 1) for part in parts if part in _ONCE)]


def _report(results: Results) -> None:
    units = results.read()
    if units:
        write_atomically(results.out / "report.md", markdown(units).encode())
        draw(units, results.out / "plot.png")
