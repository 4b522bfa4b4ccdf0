"""The private names of torch do what rankwise relies on."""

import pytest
import torch

from rankwise.compat.torch import compilation_refused, fused_adamw, is_view


def test_code_that_tries_to_compile_is_refused_and_afterwards_not():
    compiler = torch.compile
    with compilation_refused(), pytest.raises(RuntimeError, match="not compiled"):
        torch.compile(torch.sin)
    assert torch.compile is compiler


class _ViewOfInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view(4)

    @staticmethod
    def backward(ctx, grad):
        return grad.view(2, 2)


def test_a_view_is_told_from_what_has_its_own_memory():
    x = torch.ones(2, 2)
    assert is_view(x.view(4))
    assert not is_view(x)
    assert not is_view(x.view(4).clone())


def test_autograd_refuses_in_place_changes_of_views_that_a_function_made():
    made = _ViewOfInput.apply(torch.ones(2, 2, requires_grad=True))
    assert is_view(made)
    with pytest.raises(RuntimeError, match="view"):
        made.add_(1)


def test_a_row_is_updated_as_the_optimizer_does():
    generator = torch.Generator().manual_seed(0)
    rows, gradients = (torch.randn(2, 50, generator=generator) for _ in range(2))
    moments = torch.zeros(2, 50), torch.zeros(2, 50)
    parameter = torch.nn.Parameter(rows[1].clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)
    first = rows[0].clone()
    for step in (1, 2):
        parameter.grad = gradients[1] * step
        optimizer.step()
        fused_adamw(
            rows[1],
            gradients[1] * step,
            (moments[0][1], moments[1][1]),
            step,
            lr=0.1,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=0.1,
        )
    assert torch.equal(rows[1], parameter)
    assert torch.equal(rows[0], first)
    assert not moments[0][0].any()
