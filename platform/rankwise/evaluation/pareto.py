"""Which configurations are worth their cost: those that no other one beats in everything at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def front(costs: Sequence[Sequence[float]]) -> list[bool]:
    """Whether each point is on the Pareto front: no other point is at most as large everywhere and smaller somewhere.

    Args:
        costs: One row for each point, smaller is better in every column, all finite. Equal points are all on it.
    """
    if not len(costs):
        return []
    table = np.asarray(costs, dtype=np.float64)
    kept = []
    for row in table:
        beats = np.all(table <= row, axis=1) & np.any(table < row, axis=1)
        kept.append(not bool(beats.any()))
    return kept
