import math

import pytest
import torch

from rankwise.modeling.anatomy.anatomy import measure_delta, singular_values


def factors(r, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, inputs, generator=generator), torch.randn(outputs, r, generator=generator)


def with_values(values, inputs=24, outputs=16):
    """Factors whose product has the given singular values."""
    r = len(values)
    left = torch.linalg.qr(factors(r, inputs, outputs)[1].double()).Q
    right = torch.linalg.qr(factors(r, inputs, outputs, seed=1)[0].double().T).Q
    return right.T, left * torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("r", "inputs", "outputs"), [(4, 32, 16), (16, 8, 32), (16, 32, 8), (1, 5, 7), (8, 8, 8)])
def test_singular_values_are_those_of_the_full_delta(r, inputs, outputs):
    a, b = factors(r, inputs, outputs)
    expected = torch.linalg.svdvals(2.5 * (b.double() @ a.double()))[: min(r, inputs, outputs)]
    torch.testing.assert_close(singular_values(a, b, 2.5), expected, rtol=1e-9, atol=1e-9)


def test_the_norm_is_that_of_the_full_delta():
    a, b = factors(4, 32, 16)
    assert measure_delta(a, b, 0.5).norm == pytest.approx(float((0.5 * b.double() @ a.double()).norm()))


def test_equal_singular_values_use_every_rank():
    delta = measure_delta(*with_values([3.0] * 8), 1.0)
    assert delta.effective_rank == pytest.approx(8)
    assert delta.stable_rank == pytest.approx(8)
    assert delta.rank_99 == 8


def test_one_direction_has_rank_one_however_large_r_is():
    delta = measure_delta(*with_values([5.0, 0.0, 0.0, 0.0]), 2.0)
    assert (delta.effective_rank, delta.stable_rank, delta.rank_99) == (pytest.approx(1), pytest.approx(1), 1)
    assert delta.norm == pytest.approx(10)


def test_effective_rank_is_the_exponential_of_the_entropy_of_the_shares():
    values = [4.0, 2.0, 1.0, 1.0]
    entropy = -sum(v / 8 * math.log(v / 8) for v in values)
    delta = measure_delta(*with_values(values), 1.0)
    assert delta.effective_rank == pytest.approx(math.exp(entropy))
    assert delta.stable_rank == pytest.approx(22 / 16)


def test_rank_99_counts_the_directions_that_keep_99_percent_of_the_energy():
    assert measure_delta(*with_values([10.0, 10.0, 1.0, 0.5]), 1.0).rank_99 == 2
    assert measure_delta(*with_values([10.0, 10.0, 2.0, 0.5]), 1.0).rank_99 == 3


def test_ranks_do_not_depend_on_the_scale():
    a, b = factors(4, 32, 16)
    one, other = measure_delta(a, b, 1e-12), measure_delta(a, b, 1e6)
    assert one.effective_rank == pytest.approx(other.effective_rank)
    assert one.rank_99 == other.rank_99


def test_an_untrained_delta_is_zero_with_rank_zero():
    a, b = factors(4, 32, 16)
    delta = measure_delta(a, torch.zeros_like(b), 2.0)
    assert (delta.norm, delta.effective_rank, delta.stable_rank, delta.rank_99) == (0, 0, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_give_no_rank(bad):
    a, b = factors(4, 32, 16)
    a[0, 0] = bad
    delta = measure_delta(a, b, 2.0)
    assert math.isnan(delta.norm)
    assert delta.effective_rank == 0


def test_bfloat16_factors_are_measured_in_double_precision():
    a, b = (tensor.bfloat16() for tensor in factors(4, 32, 16))
    assert measure_delta(a, b, 1.0).norm == pytest.approx(float((b.double() @ a.double()).norm()))
