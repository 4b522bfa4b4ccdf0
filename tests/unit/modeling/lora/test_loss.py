"""Losses in chunks against cross-entropy over all logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from rankwise.modeling.lora import loss
from rankwise.modeling.lora.loss import head_losses, is_frozen_linear

TOKENS, MODEL, VOCABULARY = 11, 6, 37


def make(dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(MODEL, VOCABULARY, bias=bias).requires_grad_(False)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(TOKENS, MODEL, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return hidden, head.to(dtype), targets, torch.rand(TOKENS, generator=generator)


@pytest.mark.parametrize("rows", [1, 4, 11, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_those_of_cross_entropy(monkeypatch, rows, bias):
    monkeypatch.setattr(loss, "CHUNK_ON_CPU", rows * VOCABULARY)
    hidden, head, targets, weights = make(bias=bias)
    mine = head_losses(hidden, head, targets)
    (mine * weights).sum().backward()
    other = hidden.detach().clone().requires_grad_()
    theirs = functional.cross_entropy(head(other), targets, reduction="none")
    (theirs * weights).sum().backward()
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(hidden.grad, other.grad)


def test_in_16_bit_losses_are_in_fp32_and_gradients_close():
    hidden, head, targets, weights = make(torch.bfloat16)
    mine = head_losses(hidden, head, targets)
    (mine * weights).sum().backward()
    other = hidden.detach().clone().requires_grad_()
    theirs = functional.cross_entropy(head(other).float(), targets, reduction="none")
    (theirs * weights).sum().backward()
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)
    assert hidden.grad.dtype == torch.bfloat16
    assert float((hidden.grad - other.grad).float().norm() / other.grad.float().norm()) < 0.01


def test_nan_stays_in_its_token():
    hidden, head, targets, _ = make()
    with torch.no_grad():
        hidden[3] = torch.nan
    losses = head_losses(hidden, head, targets)
    losses.sum().backward()
    bad = torch.arange(TOKENS) == 3
    assert torch.equal(torch.isnan(losses), bad)
    assert torch.equal(torch.isnan(hidden.grad).any(dim=1), bad)


def test_no_tokens_are_no_losses():
    hidden, head, targets, _ = make()
    losses = head_losses(hidden[:0], head, targets[:0])
    losses.sum().backward()
    assert losses.shape == (0,)


def test_only_frozen_linear_heads_are_taken():
    _, head, *_ = make()
    assert is_frozen_linear(head)
    assert not is_frozen_linear(nn.Linear(2, 3))
    assert not is_frozen_linear(nn.Identity())
