"""The private names of torch do what rankwise relies on."""

import pytest
import torch

from rankwise.compat.torch import compilation_refused, create_adamw_state, is_view


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


def _stepped(prepare):
    """The parameters and state keys after two steps of a fused AdamW."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (5,))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1, fused=True)
    prepare(optimizer)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters, optimizer


def test_a_state_made_early_is_the_one_that_the_first_step_makes():
    ours, early = _stepped(create_adamw_state)
    theirs, late = _stepped(lambda optimizer: None)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        mine, made = early.state[one], late.state[other]
        assert list(mine) == list(made)
        assert [(value.dtype, value.shape) for value in mine.values()] == [
            (value.dtype, value.shape) for value in made.values()
        ]
        assert all(torch.equal(mine[key], made[key]) for key in made)


def test_the_first_step_takes_the_state_that_is_there():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    create_adamw_state(optimizer)
    before = {key: value.data_ptr() for key, value in optimizer.state[parameter].items()}
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert {key: value.data_ptr() for key, value in optimizer.state[parameter].items()} == before
    assert optimizer.state[parameter]["step"] == 1
