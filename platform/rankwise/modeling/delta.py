"""Norm and ranks of an adapter's delta, scaling * B A, from its factors.

Shapes: A is (r, in_features), B is (out_features, r). The delta itself, (out_features, in_features), is never made:
with reduced QR decompositions B = Q1 R1 and A^T = Q2 R2, its singular values are those of scaling * R1 R2^T, (r, r).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rankwise.modeling.anatomy_rank import rank_of_energy


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What a delta's singular values s say.

    Attributes:
        norm: Frobenius norm, the root of the sum of s^2.
        effective_rank: exp of the entropy of s / sum(s) (Roy and Vetterli 2007, "The effective rank: a measure of
            effective dimensionality"); between 1 and r, 0 of a delta that is zero.
        stable_rank: norm^2 / max(s)^2 (Rudelson and Vershynin 2007); 0 of a delta that is zero.
        rank_99: The smallest rank that keeps 99 % of norm^2; 0 of a delta that is zero.
        singular_values: s itself, largest first; empty of a delta that is not finite.
    """

    norm: float
    effective_rank: float
    stable_rank: float
    rank_99: int
    singular_values: tuple[float, ...] = ()


def singular_values(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """The singular values of scaling * B A, largest first, in float64: min(r, in_features, out_features) of them."""
    r1 = torch.linalg.qr(lora_B.double(), mode="r").R
    r2 = torch.linalg.qr(lora_A.double().T, mode="r").R
    values: torch.Tensor = torch.linalg.svdvals(r1 @ r2.T)
    return values * abs(scaling)


def measure_delta(lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> Delta:
    """Measure one delta; a delta with numbers that are not finite has a norm of NaN and ranks of 0.

    Args:
        lora_A: (r, in_features).
        lora_B: (out_features, r).
        scaling: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA.
    """
    if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
        return Delta(norm=float("nan"), effective_rank=0.0, stable_rank=0.0, rank_99=0)
    values = singular_values(lora_A, lora_B, scaling)
    total, largest = float(values.sum()), float(values.max()) if values.numel() else 0.0
    singular = tuple(values.tolist())
    if largest == 0.0:
        return Delta(norm=0.0, effective_rank=0.0, stable_rank=0.0, rank_99=0, singular_values=singular)
    shares = values / total
    energy = (values / largest) ** 2
    return Delta(
        norm=float(torch.linalg.vector_norm(values)),
        # xlogy takes 0 log 0 as 0.
        effective_rank=float(torch.exp(-torch.special.xlogy(shares, shares).sum())),
        stable_rank=float(energy.sum()),
        rank_99=rank_of_energy(energy.tolist()),
        singular_values=singular,
    )
