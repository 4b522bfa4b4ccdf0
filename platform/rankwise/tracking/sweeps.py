"""Which arms belong to a sweep, and which sweep of an experiment is the current one, as tags of the sweep's run.

An arm's own run names the sweep that trained it as its parent. A definition that was extended has arms of earlier
sweeps too, so its run lists all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from rankwise.tracking.query import RunRecord

ARMS = "rankwise.arms"
SUBMITTED = "rankwise.submitted"
_SHORT = 12
# A tag holds 8,000 characters: 600 hashes of 12 digits and a comma each.
_PER_TAG = 600


def sweep_tags(spec_hashes: Collection[str]) -> dict[str, str]:
    """Tags for the run of a sweep, set whenever it is submitted (or has grown by a round of a search).

    Args:
        spec_hashes: Of all of its arms, also those that were trained before.
    """
    shorts = sorted({spec_hash[:_SHORT] for spec_hash in spec_hashes})
    parts = [shorts[start : start + _PER_TAG] for start in range(0, len(shorts), _PER_TAG)]
    tags = {ARMS if number == 0 else f"{ARMS}.{number}": ",".join(part) for number, part in enumerate(parts)}
    return {**tags, SUBMITTED: str(time.time_ns() // 1_000_000)}


def current_sweep(sweeps: Sequence[RunRecord]) -> RunRecord | None:
    """The sweep that was submitted last, of the runs of kind `sweep`."""
    return max(sweeps, key=_submitted, default=None)


def of_sweep(sweep: RunRecord, arms: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs of arms that belong to a sweep: those it lists, and those it is the parent of."""
    belongs = membership(sweep)
    return [run for run in arms if belongs(run.parent, run.spec_hash or "")]


def membership(sweep: RunRecord) -> Callable[[str | None, str], bool]:
    """Tells of an arm, by the run id of its parent and its spec hash, whether it belongs to a sweep."""
    listed = {
        short
        for key, value in sweep.tags.items()
        if key == ARMS or key.startswith(f"{ARMS}.")
        for short in value.split(",")
    }
    return lambda parent, spec_hash: parent == sweep.run_id or spec_hash[:_SHORT] in listed


def _submitted(run: RunRecord) -> int:
    text = run.tags.get(SUBMITTED, "")
    return int(text) if text.isdecimal() else run.started_ms
