"""Which rows train and which evaluate: splits, limits, and mixtures of several sources.

Rows are ordered by a SHA-256 of the seed and of the row, not by a random generator, so the choice is the same on every
machine and changes little when a table gains rows.

A source that gives more rows than it has gives all of them as often as that is possible, and of the rest those that
`choose` takes. These are the rows of every epoch; the order of an epoch is the sampler's.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from rankwise.exceptions import DatasetError
from rankwise.experiment.mixture import epoch_rows, evaluation_rows
from rankwise.experiment.schema import DataSource


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
            "prompts. Equal prompts must be on one side, so no rows would be left to train on; reduce rows, or provide "
            "a separate evaluation set"
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
    return sorted(heapq.nsmallest(limit, range(len(ids)), key=lambda position: _rank(seed, side, ids[position])))


def _rank(seed: int, kind: Hashable, text: str) -> bytes:
    return hashlib.sha256(f"{seed}\x00{kind}\x00{text}".encode()).digest()


def split_sources(groups: Sequence[Sequence[str]], rows: int, seed: int, labels: Sequence[str]) -> list[Split]:
    """Split evaluation rows off several sources, so that no group lies on both sides of any of them.

    Each source gives a number of rows in proportion to its own (`experiment.mixture`). Groups are taken as in
    `split_groups`, source after source; first those that an earlier source has taken.

    Args:
        groups: Of the rows of each source.
        rows: Number of evaluation rows.
        seed: Another seed gives another split.
        labels: Names of the sources, for messages.

    Raises:
        DatasetError: A source has too few rows.
    """
    quotas = evaluation_rows([len(own) for own in groups], rows)
    taken: set[str] = set()
    chosen: list[list[int]] = []
    for own, quota in zip(groups, quotas, strict=True):
        members: dict[str, list[int]] = {}
        for position, group in enumerate(own):
            members.setdefault(group, []).append(position)
        picked: list[int] = []
        for group in sorted(members, key=lambda group: (group not in taken, _rank(seed, "group", group))):
            if len(picked) == quota:
                break
            picked += members[group][: quota - len(picked)]
            taken.add(group)
        chosen.append(sorted(picked))
    splits = []
    for label, own, quota, picked in zip(labels, groups, quotas, chosen, strict=True):
        train = [position for position, group in enumerate(own) if group not in taken]
        if len(picked) < quota or not train:
            raise DatasetError(
                f"dataset.eval: rows is {rows:,}, of which {quota:,} are split off {label}, but that source has "
                f"{len(own):,} rows with {len(set(own)):,} different prompts, and equal prompts must be on one side: "
                "no rows of it would be left to train on. Reduce rows, or provide separate evaluation data"
            )
        sides = {*picked, *train}
        left_out = [position for position in range(len(own)) if position not in sides]
        splits.append(Split(train=train, eval=picked, left_out=left_out))
    return splits


@dataclass(frozen=True, order=True, slots=True)
class Pick:
    """One row of an epoch: the number of its source, its position there, and which copy of it this is (from 1)."""

    source: int
    position: int
    copy: int = 1


def mix(sources: Sequence[DataSource], ids: Sequence[Sequence[str]], limit: int | None, seed: int) -> list[Pick]:
    """The rows of an epoch of several sources, source by source.

    Args:
        sources: Of `dataset.train`.
        ids: Of the rows of each that are not for evaluation.
        limit: As `dataset.limit.train`. Weights share it out; without weights, it chooses from the rows of all sources.
        seed: Of `choose`.

    Raises:
        DatasetError: A source would give no rows.
    """
    picks: list[Pick] = []
    for source, (own, rows) in enumerate(zip(ids, epoch_rows(sources, [len(own) for own in ids], limit), strict=True)):
        whole, rest = divmod(rows, len(own))
        picks += [Pick(source, position, copy + 1) for copy in range(whole) for position in range(len(own))]
        picks += [Pick(source, position, whole + 1) for position in choose(own, rest, seed, "train")]
    if limit is None or len(picks) <= limit:
        return picks
    names = [f"{pick.source}\x00{pick.copy}\x00{ids[pick.source][pick.position]}" for pick in picks]
    return [picks[place] for place in choose(names, limit, seed, "train")]
