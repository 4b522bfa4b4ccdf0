"""The table of `make faults`: each injected fault, what must hold, and the figure that was measured.

A test calls `record` once its assertions have passed; the rows are printed at the end of the session.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    must_hold: str
    figure: str


_rows: list[Row] = []


def record(fault: str, must_hold: str, figure: str) -> None:
    """Note what a fault did.

    Args:
        fault: What was injected.
        must_hold: What the test has asserted.
        figure: The numbers: how often, how long, how many.
    """
    _rows.append(Row(fault, must_hold, figure))


def print_rows(write_line: Callable[[str], object]) -> None:
    """Write the table, nothing when there is nothing."""
    if not _rows:
        return
    heads = Row("fault", "must hold", "measured")
    widths = [max(len(getattr(row, name)) for row in (heads, *_rows)) for name in ("fault", "must_hold")]
    write_line("")
    for row in (heads, *_rows):
        write_line(f"{row.fault:<{widths[0]}}  {row.must_hold:<{widths[1]}}  {row.figure}")
