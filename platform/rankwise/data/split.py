"""Which rows train and which evaluate: a split by groups, and limits.

Both choices order things by a SHA-256 of the seed and of what is chosen, never by a random generator's state, so that
they are the same on every machine and move little when the table gains rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from rankwise.exceptions import DatasetError


@dataclass(frozen=True, kw_only=True)
class Split:
    """Positions of rows on either side, in the table's order."""

    train: list[int]
    eval: list[int]
    left_out: list[int]
    """Rows of the last evaluation group beyond the wanted number: they belong to neither side."""


def split_groups(groups: Sequence[str], rows: int, seed: int) -> Split:
    """Choose `rows` evaluation rows so that no group lies on both sides.

    Groups are taken for evaluation in the order of `sha256(seed, group)` until they have at least `rows` rows. Of the
    last group only as many rows stay as are wanted, the first of the table; its others are left out. New rows elsewhere
    in the table change a group's side only where they come before it in that order.

    Args:
        groups: For each row of the table what must not lie on both sides, for example the prompt.
        rows: Number of evaluation rows.
        seed: Another seed gives another split.

    Raises:
        DatasetError: Nothing would be left to train on.
    """
    members: dict[str, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    taken: list[int] = []
    left_out: list[int] = []
    order = sorted(members, key=lambda group: _rank(seed, "group", group))
    used = 0
    while len(taken) < rows and used < len(order):
        block = members[order[used]]
        room = rows - len(taken)
        taken += block[:room]
        left_out += block[room:]
        used += 1
    if len(taken) < rows or used == len(order):
        raise DatasetError(
            f"dataset.eval: rows is {rows:,}, but the table has {len(groups):,} rows with {len(members):,} different "
            "prompts, and equal prompts must fall on one side, so that nothing would be left to train on; ask for "
            "fewer rows, or give an evaluation set of its own"
        )
    outside = {*taken, *left_out}
    train = [position for position in range(len(groups)) if position not in outside]
    return Split(train=train, eval=sorted(taken), left_out=sorted(left_out))


def choose(ids: Sequence[str], limit: int | None, seed: int, side: str) -> list[int]:
    """Positions of at most `limit` rows, in the order given: those whose `sha256(seed, side, id)` is smallest.

    A larger limit keeps the rows of a smaller one.
    """
    if limit is None or limit >= len(ids):
        return list(range(len(ids)))
    ranked = sorted(range(len(ids)), key=lambda position: _rank(seed, side, ids[position]))
    return sorted(ranked[:limit])


def _rank(seed: int, kind: Hashable, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\x00{kind}\x00{text}".encode()).digest()
