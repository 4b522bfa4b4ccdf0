"""Is r = 64 used, or would 8 do? An answer from the singular values of an adapter's deltas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ENERGY = 0.99


@dataclass(frozen=True, kw_only=True)
class RankUse:
    """How much of its rank an adapter uses.

    Energy is squared norm: the best approximation of rank k keeps the k largest squared singular values (Eckart and
    Young 1936).

    Attributes:
        r: The adapter's largest rank.
        rank_99: The smallest rank k so that the best approximations of rank k of all deltas together keep 99 % of
            their energy.
        least: The smallest rank that keeps 99 % of a single delta, in the module that needs the least.
        most: As above, in the module that needs the most.
        enough: The smallest power of two that is not below `rank_99`, or `r` where that is smaller.
    """

    r: int
    rank_99: int
    least: int
    most: int
    enough: int

    @property
    def text(self) -> str:
        """The answer in words."""
        single = f"single modules need {self.least}" + (f" to {self.most}" if self.most > self.least else "")
        kept = f"rank {self.rank_99} keeps {100 * ENERGY:g} % of the energy of all deltas ({single})"
        if self.enough < self.r:
            return f"r = {self.r} is more than was used: {kept}; r = {self.enough} would hold it"
        return f"r = {self.r} is used: {kept}"


def rank_use(singular_values: Sequence[Sequence[float]], *, r: int) -> RankUse | None:
    """Judge the deltas of an adapter; None where none was learned.

    Args:
        singular_values: Of each delta, largest first. Those that are zero or empty do not count.
        r: The adapter's largest rank.
    """
    energies = [[value * value for value in values] for values in singular_values if values and values[0] > 0]
    if not energies:
        return None
    pooled = [sum(energy[k] for energy in energies if k < len(energy)) for k in range(max(map(len, energies)))]
    rank = rank_of_energy(pooled)
    singles = [rank_of_energy(energy) for energy in energies]
    enough = 1 << (rank - 1).bit_length()
    return RankUse(r=r, rank_99=rank, least=min(singles), most=max(singles), enough=min(enough, r))


def rank_of_energy(energy: Sequence[float]) -> int:
    """The smallest k whose first k energies are 99 % of all.

    Args:
        energy: Squared singular values, largest first, not all zero.
    """
    kept = kept_energy(energy)
    return next(k for k, share in enumerate(kept, start=1) if share >= ENERGY)


def kept_energy(energy: Sequence[float]) -> list[float]:
    """The share of the whole energy that rank 1, 2, ... keeps; the last is 1."""
    whole, kept, shares = sum(energy), 0.0, []
    for value in energy:
        kept += value
        shares.append(kept / whole)
    return [*shares[:-1], 1.0]
