"""Adapters one by one against the formula: see `test_stacks` for those of a pack."""

import pytest
import torch

from rankwise.modeling.lora.draws import DropoutKey, keep_mask, keep_share
from rankwise.modeling.lora.function import Slice, add_lora

ROWS, TOKENS, INPUT, OUTPUT = 5, 6, 7, 4


def make_slices(p=0.0):
    key = DropoutKey(seed=1, step=2, micro_step=0) if p else None
    return [
        Slice(start=0, stop=2, length=6, scaling=2.0, p=p, key=key, module="m"),
        Slice(start=2, stop=4, length=4, scaling=0.5, p=0.0, key=None, module="m"),
    ]


def make_tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    matrices = [draw(3, INPUT), draw(OUTPUT, 3), draw(2, INPUT), draw(OUTPUT, 2)]
    return draw(ROWS, TOKENS, OUTPUT), draw(ROWS, TOKENS, INPUT), matrices


def reference(y, x, slices, matrices):
    """The formula, row by row, left to autograd."""
    y = y.clone()
    for index, part in enumerate(slices):
        a, b = matrices[2 * index], matrices[2 * index + 1]
        own = x[part.start : part.stop, : part.length]
        if part.key is not None:
            mask = keep_mask(tuple(own.shape), part.p, part.key, part.module)
            own = own * mask / keep_share(part.p)
        y[part.start : part.stop, : part.length] = (
            y[part.start : part.stop, : part.length] + part.scaling * own @ a.t() @ b.t()
        )
    return y


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_values_and_all_gradients_are_those_of_the_formula(p):
    slices = make_slices(p)
    weights = torch.randn(ROWS, TOKENS, OUTPUT, dtype=torch.float64)
    results = []
    for compute in (add_lora, reference):
        y, x, matrices = make_tensors()
        out = compute(y * 1.0, x, slices, matrices)
        (out * weights).sum().backward()
        results.append([out.detach(), y.grad, x.grad, *[each.grad for each in matrices]])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_without_gradients_the_values_are_the_same():
    y, x, matrices = make_tensors()
    with_gradient = add_lora(y * 1.0, x, make_slices(0.4), matrices).detach()
    with torch.no_grad():
        assert torch.allclose(add_lora(y * 1.0, x, make_slices(0.4), matrices), with_gradient, rtol=1e-12)


def test_rows_of_no_slice_and_padding_keep_the_bases_output():
    y, x, matrices = make_tensors()
    out = add_lora(y * 1.0, x, make_slices(), matrices)
    assert torch.equal(out[4], y[4])
    assert torch.equal(out[2:4, 4:], y[2:4, 4:])


def test_a_frozen_input_gets_no_gradient():
    y, x, matrices = make_tensors()
    out = add_lora(y.detach().clone(), x.detach(), make_slices(), matrices)
    out.sum().backward()
    assert matrices[0].grad is not None
    assert x.grad is None


def test_nan_in_one_arms_rows_stays_there_in_both_directions():
    y, x, matrices = make_tensors()
    with torch.no_grad():
        x[0, 0, 0] = torch.nan
        matrices[1][0, 0] = torch.inf
    out = add_lora(y * 1.0, x, make_slices(0.4), matrices)
    out.sum().backward()
    assert torch.isfinite(out[2:]).all()
    assert torch.isfinite(x.grad[2:]).all()
    assert torch.isfinite(matrices[2].grad).all()
    assert torch.isfinite(matrices[3].grad).all()
    assert not torch.isfinite(matrices[0].grad).all()


def test_matrices_stay_in_fp32_under_a_16_bit_base():
    y, x, matrices = make_tensors(torch.float32)
    half_y, half_x = y.detach().bfloat16().requires_grad_(), x.detach().bfloat16().requires_grad_()
    out = add_lora(half_y * 1.0, half_x, make_slices(0.4), matrices)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {each.grad.dtype for each in matrices} == {torch.float32}
    assert half_x.grad.dtype == torch.bfloat16
