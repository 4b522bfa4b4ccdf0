"""The equality gate: ways of training are only compared when they have computed the same numbers.

One rounding has to be known for that: over SmolLM2's 49,152 tokens torch's cross entropy on a CPU sums in fp32 and is
off by some 2e-5 nats against fp64, while TRL's own loss, summed in tiles, is not. The engine, the plain loop and the
Trainer of transformers use torch's. So for a pair of which one is TRL, that much, as measured on the base at hand
(`loss_rounding`), is allowed beside the relative tolerance, and only its first steps count, one before and one after an
update: the rounding is in the gradients too, AdamW divides small ones by themselves, the difference grows by two or
three times a step, and after 16 steps losses were 1.5e-4 apart. The difference over all steps is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from rankwise.data.batches import Batch

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 1e-2}
"""Largest relative difference of two losses, by the dtype of the matrix products."""
TRL_STEPS = 2
"""Steps that count for a pair of which one is TRL."""


@dataclass(kw_only=True)
class Gate:
    """Collects losses, and compares every way with the first other way that trained the same arm.

    Attributes:
        tolerance: Largest relative difference.
        rounding: Nats allowed on top for a pair of which one is TRL.
        blocks: Way, arm, and one loss a step, in the order of time.
    """

    tolerance: float
    rounding: float = 0.0
    blocks: list[tuple[str, str, list[float]]] = field(default_factory=list)

    def add(self, way: str, losses: Mapping[str, Sequence[float]]) -> None:
        """Take the losses of a block's arms."""
        self.blocks += [(way, arm, list(values)) for arm, values in losses.items()]

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """Of each way: whether it is valid, the largest relative difference, over how many losses of how many arms."""
        found = {}
        for way in dict.fromkeys(way for way, _, _ in self.blocks):
            worst, compared, arms, equal = 0.0, 0, set(), True
            for own, arm, values in self.blocks:
                if own != way or (reference := self._reference(arm, way)) is None:
                    continue
                other, losses = reference
                arms.add(arm)
                compared += min(len(values), len(losses))
                worst = max(worst, difference(values, losses))
                trl = is_trl(way) or is_trl(other)
                counted = TRL_STEPS if trl else len(values)
                equal &= difference(values[:counted], losses, self.rounding * trl) <= self.tolerance
            found[way] = {"valid": compared > 0 and equal, "difference": worst, "losses": compared, "arms": len(arms)}
        return found

    def _reference(self, arm: str, way: str) -> tuple[str, list[float]] | None:
        others = [(other, values) for other, its, values in self.blocks if other != way and its == arm]
        return min(others, key=lambda pair: is_trl(pair[0]), default=None)


def is_trl(way: str) -> bool:
    """Whether TRL computes a way's losses."""
    return way.startswith(("P1", "P2"))


def difference(values: Sequence[float], reference: Sequence[float], rounding: float = 0.0) -> float:
    """Largest relative difference over the steps that both have, beyond `rounding`; infinite for NaN."""
    worst = 0.0
    for value, other in zip(values, reference, strict=False):
        found = max(0.0, abs(value - other) - rounding) / max(abs(other), 1e-12)
        worst = max(worst, found if math.isfinite(value - other) else math.inf)
    return worst


@torch.no_grad()
def loss_rounding(model: Any, batch: Batch) -> float:
    """How far torch's cross entropy of single tokens is off against fp64 at most, in nats."""
    device = next(model.parameters()).device
    logits = model(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)).logits
    row, token = batch.supervised.nonzero(as_tuple=True)
    chosen, targets = logits[row, token - 1].float(), batch.input_ids[row, token].to(device)
    exact = functional.cross_entropy(chosen.double(), targets, reduction="none")
    return float((functional.cross_entropy(chosen, targets, reduction="none") - exact).abs().max())
