"""Cross-entropy of a frozen head, a chunk of tokens at a time: logits of all tokens are never there at once.

Letters: `S` tokens, `D` model, `V` vocabulary.

    loss = logsumexp(W h) - (W h)[target]          d loss / d h = (softmax(W h) - onehot(target)) W

The head's weight needs no gradient, so the gradient of the hidden state is all that the backward pass needs. It is
computed in the forward pass, from the logits that are there anyway, and kept: `D` numbers a token in place of `V`.
4,096 tokens of a vocabulary of 128,256 would take 8.4 GB as logits, their logarithms and their gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

CHUNK_ON_CPU, CHUNK_ON_GPU = 1 << 24, 1 << 26
"""Logits of a chunk: 128 MiB with their exponentials on a CPU, 512 MiB on a GPU."""
BYTES = 8
"""Bytes of a chunk's logit at its peak: twice in fp32."""


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens of a chunk."""
    return max(1, (CHUNK_ON_CPU if device.type == "cpu" else CHUNK_ON_GPU) // vocabulary)


def is_frozen_linear(head: Any) -> bool:
    """Whether a head is one that `head_losses` takes."""
    return isinstance(head, nn.Linear) and head.weight.is_floating_point() and not head.weight.requires_grad


def head_losses(hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
    """The negative log likelihoods of targets.

    Args:
        hidden: (S, D).
        head: A linear layer without adapters, (D, V), whose weight needs no gradient.
        targets: (S,).

    Returns:
        (S,) in fp32, in nats.
    """
    losses: torch.Tensor = _HeadLosses.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return losses


class _HeadLosses(torch.autograd.Function):
    """`head_losses`, with the gradient of the hidden states at hand."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: nn.Linear, targets: torch.Tensor) -> torch.Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = chunk_rows(head.weight.shape[0], hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = head(hidden[part]).float()
            chosen = targets[part, None]
            total = torch.logsumexp(logits, dim=-1, keepdim=True)
            losses[part] = (total - logits.gather(1, chosen)).squeeze(1)
            if grad is not None:
                slopes = logits.sub_(total).exp_()
                slopes.scatter_add_(1, chosen, torch.full_like(total, -1.0))
                torch.mm(slopes.to(hidden.dtype), head.weight, out=grad[part])
        if grad is not None:
            ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return (grad * grads[0][:, None]).to(grad.dtype), None, None
