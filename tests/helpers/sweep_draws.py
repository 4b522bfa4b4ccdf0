"""Draws results of sweeps for simulations of the answer, by other assumptions than the rule's own.

Seeds move whole results by Student's t, Laplace or normal shifts of another size for each rank, partly common to all
ranks of a seed. Rows belong to prompts of unequal numbers of rows and unequal weights. A rank has its own tastes for
prompts, which may be skewed, heavy-tailed or rare, and each seed has tastes of its own: prompts that one seed learns
and another does not. The rule knows none of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Results of B sweeps: (B, K, S), influences (B, K, S, G), shares (G,)."""

    values: np.ndarray
    influences: np.ndarray
    shares: np.ndarray

    def of(self, seeds: int) -> Draws:
        return Draws(values=self.values[:, :, :seeds], influences=self.influences[:, :, :seeds], shares=self.shares)


def noise(draw: np.random.Generator, shape: str, size: Sequence[int]) -> np.ndarray:
    """Of mean 0; of variance 1 except for `rare`, where 1 of 20 prompts is worse by 1."""
    match shape:
        case "normal":
            return draw.normal(size=size)
        case "heavy":
            return draw.standard_t(3, size=size) / np.sqrt(3)
        case "laplace":
            return draw.laplace(scale=np.sqrt(0.5), size=size)
        case "worse tail":
            return (draw.lognormal(0.0, 1.0, size) - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)
        case "better tail":
            return -noise(draw, "worse tail", size)
        case "rare":
            return (draw.random(size) < 0.05) - 0.05
    raise ValueError(shape)


def draw_sweeps(
    draw: np.random.Generator,
    sweeps: int,
    truth: Sequence[float],
    *,
    seeds: int,
    prompts: int,
    seed_sd: float | Sequence[float] = 1.0,
    seed_shape: str = "laplace",
    common: float = 0.5,
    rank_taste: float = 1.0,
    taste_shape: str = "normal",
    seed_taste: float = 1.0,
    rows_per_prompt: Sequence[int] | None = None,
) -> Draws:
    """Draw sweeps.

    Args:
        draw: The generator.
        sweeps: B.
        truth: (K,) true means; the last rank is the reference.
        seeds: S.
        prompts: G, each a cluster of rows.
        seed_sd: Standard deviation over seeds of each rank's results.
        seed_shape: Its distribution.
        common: Standard deviation of what all ranks of a seed share.
        rank_taste: Standard deviation over prompts of what a rank does with them, the same for all seeds.
        taste_shape: Its distribution; of skewed ones, the reference has none, so that differences are skewed.
        seed_taste: The same of each seed of a rank.
        rows_per_prompt: (G,); None: one each. Rows of a prompt have the prompt's results.
    """
    ranks = len(truth)
    sizes = np.ones(prompts) if rows_per_prompt is None else np.asarray(rows_per_prompt, dtype=float)
    weights = sizes * np.linspace(0.8, 1.2, prompts)
    shares = weights / weights.sum()
    shifts = noise(draw, seed_shape, (sweeps, ranks, seeds)) * np.broadcast_to(seed_sd, (ranks,))[:, None]
    shifts += common * draw.normal(size=(sweeps, 1, seeds))
    tastes = rank_taste * noise(draw, taste_shape, (sweeps, ranks, prompts))
    if taste_shape not in {"normal", "heavy"}:
        tastes[:, -1] = 0.0
    influences = tastes[:, :, None, :] + np.zeros((1, 1, seeds, 1))
    if seed_taste:
        influences += seed_taste * draw.normal(size=(sweeps, ranks, seeds, prompts))
    means = influences @ shares
    values = np.asarray(truth)[:, None] + shifts + means
    influences -= means[..., None]
    influences *= shares
    return Draws(values=values, influences=influences, shares=shares)
