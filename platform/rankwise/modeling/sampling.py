"""The next token of each row: the likeliest, or a draw from the row's own generator.

Letters: B rows, V vocabulary.

A draw adds Gumbel noise to the logits and takes the largest, which draws from the softmax exactly (Gumbel 1954;
Maddison et al. 2014, "A* sampling"). The noise comes from a generator of the row's own, on the CPU, so that a row draws
the same tokens in any batch and on any device. What may be drawn is cut as in transformers: by `top_k` first, then by
`top_p` of what is left, both after the temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def generator(seed: int) -> torch.Generator:
    """The generator of one row."""
    return torch.Generator().manual_seed(seed)


def noisy(
    logits: torch.Tensor, generators: Sequence[torch.Generator], *, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Scores whose largest entry is a draw from softmax(logits / temperature), cut at `top_k` and `top_p`.

    Args:
        logits: (B, V).
        generators: One for each row.
        temperature: Above 0.
        top_k: The likeliest tokens that may be drawn; 0 for all.
        top_p: Of these, the likeliest that together have at least this probability.

    Returns:
        (B, V) in fp32; -inf where a token may not be drawn.
    """
    scores = logits.float() / temperature
    vocabulary = scores.shape[-1]
    if 0 < top_k < vocabulary:
        least = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if top_p < 1.0:
        ordered, order = scores.sort(dim=-1, descending=True)
        chances = ordered.softmax(dim=-1)
        # A token stays while those before it do not reach top_p: the likeliest one always stays.
        drop = (chances.cumsum(dim=-1) - chances) >= top_p
        scores = scores.masked_fill(drop.scatter(1, order, drop), float("-inf"))
    waiting = torch.stack([torch.empty(vocabulary).exponential_(generator=one) for one in generators])
    return scores - waiting.log().to(scores.device)
