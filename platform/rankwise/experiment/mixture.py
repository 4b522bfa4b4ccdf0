"""How many rows each of several sources gives to an epoch, and to evaluation.

| sources | rows of an epoch |
|---|---|
| neither weights nor numbers of rows | every row of every source once |
| `rows: N` | N rows of that source |
| `weight: W` | T * W / (sum of the weights) rows; T is the number of rows that the weighted sources have together |

With `dataset.limit.train`, T is the limit without the sources of fixed size, if that is less. Fractions of rows are
rounded so that the sum is T: down, and the rows that are left go to the largest fractions, the first source first.

Which rows these are, `data.sources` decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from rankwise.exceptions import DatasetError
from rankwise.experiment.schema import DataSource


def epoch_rows(sources: Sequence[DataSource], available: Sequence[int], limit: int | None) -> tuple[int, ...]:
    """The rows of an epoch by source, before `limit` if there are no weights.

    Args:
        sources: Of `dataset.train`.
        available: Rows that each of them has, without those for evaluation.
        limit: As `dataset.limit.train`.

    Raises:
        DatasetError: A source would give no rows.
    """
    counts = [rows if source.rows is None else source.rows for source, rows in zip(sources, available, strict=True)]
    weighted = [place for place, source in enumerate(sources) if source.weight is not None]
    if weighted:
        total = sum(available[place] for place in weighted)
        if limit is not None:
            fixed = sum(counts) - total
            if limit <= fixed:
                raise DatasetError(
                    f"dataset.limit.train is {limit:,}, but the sources with a number of rows have {fixed:,} already: "
                    "raise it, or lower these numbers"
                )
            total = min(total, limit - fixed)
        shares = apportion(total, [sources[place].weight or 0 for place in weighted])
        for place, rows in zip(weighted, shares, strict=True):
            counts[place] = rows
    for place, rows in enumerate(counts):
        if not rows:
            source = sources[place]
            raise DatasetError(
                f"dataset.train[{place}] ({source.named}): the weight {source.weight:g} gives it none of the "
                f"{sum(counts):,} rows of an epoch; raise it, or set rows"
            )
    return tuple(counts)


def evaluation_rows(available: Sequence[int], rows: int) -> list[int]:
    """How many evaluation rows are split off each source: in proportion to its rows, and at least one.

    Weights have no influence, so that arms with different ones are evaluated on the same rows.
    """
    if rows < len(available):
        return apportion(rows, available)
    return [1 + share for share in apportion(rows - len(available), available)]


def apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that sum to `total`, in proportion to `weights` (method of the largest remainder)."""
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    quotas = [total * weight / whole for weight in exact]
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(weights)), key=lambda place: (counts[place] - quotas[place], place))
    for place in order[: total - sum(counts)]:
        counts[place] += 1
    return counts
