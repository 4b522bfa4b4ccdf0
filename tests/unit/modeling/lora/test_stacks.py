"""Stacked arms against the formula, written for one arm and left to autograd."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rankwise.modeling.lora.draws import DropoutKey, keep_mask, keep_share
from rankwise.modeling.lora.function import add_stacked
from rankwise.modeling.lora.packed import Segment, _groups, dropout_words
from rankwise.modeling.lora.stacks import Layout, Member, Stack, Stacks

INPUT, OUTPUT, TOKENS = 7, 4, 6
RANKS = {"a": 3, "b": 3, "c": 2, "d": 2}
ROWS = {"a": 2, "b": 2, "c": 1, "d": 1}
LENGTHS = {"a": 6, "b": 5, "c": 3, "d": 6}
DROPOUT = {"a": 0.4, "b": 0.2, "c": 0.0, "d": 0.0}
MODULE = "m"


class Layer:
    """As much of peft's layer as a stack reads, with a second module that only some arms have."""

    def __init__(self, arms, seed):
        generator = torch.Generator().manual_seed(seed)

        def matrix(*shape):
            return SimpleNamespace(weight=nn.Parameter(torch.randn(*shape, generator=generator)))

        self.lora_A = {arm: matrix(RANKS[arm], INPUT) for arm in arms}
        self.lora_B = {arm: matrix(OUTPUT, RANKS[arm]) for arm in arms}
        self.lora_dropout = {arm: nn.Dropout(DROPOUT[arm]) if DROPOUT[arm] else nn.Identity() for arm in arms}
        self.scaling = {arm: 0.5 + index for index, arm in enumerate(arms)}


@pytest.fixture(params=["exact ranks", "padded ranks", "folded scaling"])
def stacked(request):
    """A layer, and stacks in which ranks are exact as on a CPU, or padded and with scaled copies as on a GPU."""
    layer = Layer("abcd", seed=1)
    layers = {MODULE: layer}
    members = [Member.of(list(layers.items()), arm) for arm in "abcd"]
    if request.param == "exact ranks":
        stacks = [Stack(layers, members[:2], torch.float32), Stack(layers, members[2:], torch.float32)]
    else:
        stacks = [Stack(layers, members, torch.float32)]
        if request.param == "folded scaling":
            stacks[0]._copies, stacks[0]._dtype = True, torch.float32
            stacks[0]._settle()
    made = Stacks.__new__(Stacks)
    made._stacks = stacks
    return layer, made


def segments(arms="abcd", keys=True):
    made, start = [], 0
    for arm in arms:
        key = DropoutKey(seed=ord(arm), step=2, micro_step=1) if keys and DROPOUT[arm] else None
        made.append(Segment(adapter=arm, start=start, stop=start + ROWS[arm], dropout=key, length=LENGTHS[arm]))
        start += ROWS[arm]
    return made


def inputs(rows):
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randn(rows, TOKENS, size, generator=generator) for size in (OUTPUT, INPUT))
    return y.requires_grad_(), x.requires_grad_()


def reference(y, x, parts, layer):
    y = y.clone()
    for part in parts:
        own = x[part.start : part.stop, : part.length]
        if part.dropout is not None:
            p = DROPOUT[part.adapter]
            own = own * keep_mask(tuple(own.shape), p, part.dropout, MODULE) / keep_share(p)
        a, b = layer.lora_A[part.adapter].weight, layer.lora_B[part.adapter].weight
        y[part.start : part.stop, : part.length] += layer.scaling[part.adapter] * own @ a.t() @ b.t()
    return y


def groups_of(parts, stacks):
    groups = _groups(parts, stacks)
    for group in groups:
        group.prepare(dropout_words(parts))
    return groups


def gradients(stacks):
    made = {}
    for stack in stacks:
        stack.finish_gradients()
        for member in stack.members:
            for name, matrix in stack.matrices(stack.gradients, member.adapter):
                made[member.adapter, name.split(".")[-2]] = matrix.clone()
    return made


def own_tokens(tensor, parts):
    """Those that arms use: products may be added to padding, which nothing reads."""
    return torch.cat([tensor[part.start : part.stop, : part.length].flatten() for part in parts])


@pytest.mark.parametrize("keys", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("arms", ["abcd", "acd", "bd", "c"])
def test_values_and_all_gradients_are_those_of_the_formula(stacked, arms, keys):
    layer, stacks = stacked
    parts = segments(arms, keys)
    rows = parts[-1].stop + 1
    weights = torch.randn(rows, TOKENS, OUTPUT, generator=torch.Generator().manual_seed(2))
    for part in parts:
        weights[part.start : part.stop, part.length :] = 0  # as no loss reads padding
    y, x = inputs(rows)
    expected = reference(y, x, parts, layer)
    matrices = [matrix[arm].weight for arm in arms for matrix in (layer.lora_A, layer.lora_B)]
    grads = torch.autograd.grad((expected * weights).sum(), (y, x, *matrices))

    own_y, own_x = inputs(rows)
    out = add_stacked(own_y * 1.0, own_x, groups_of(parts, stacks), MODULE)
    (out * weights).sum().backward()
    torch.testing.assert_close(own_tokens(out, parts), own_tokens(expected, parts))
    assert torch.equal(out[-1], own_y[-1]), "rows of no arm"
    torch.testing.assert_close(own_y.grad, grads[0])
    torch.testing.assert_close(own_x.grad, grads[1], rtol=1e-5, atol=1e-5)
    mine = gradients(stacks)
    theirs = {
        (arm, side): grads[2 + 2 * n + m] for n, arm in enumerate(arms) for m, side in enumerate(("lora_A", "lora_B"))
    }
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-5)
    assert not any(value.any() for key, value in mine.items() if key not in theirs)
    for stack in stacks:
        padding = stack.gradients.abs().sum() - sum(
            mine[m.adapter, s].abs().sum() for m in stack.members for s in ("lora_A", "lora_B")
        )
        assert abs(float(padding)) < 1e-3, "padding gets no gradient"


@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "turned"])
def test_several_inputs_of_a_token_have_masks_of_their_own_and_the_gradients_of_the_formula(stacked, turned):
    """Heads: three columns of a row belong to each token. Some models give them as turned views."""
    layer, stacks = stacked
    heads = 3
    parts = segments()
    rows = parts[-1].stop + 1
    generator = torch.Generator().manual_seed(0)

    def draw(size):
        made = torch.randn(rows, TOKENS * heads, size, generator=generator)
        return made.transpose(0, 1).contiguous().transpose(0, 1) if turned else made

    y, x = draw(OUTPUT).requires_grad_(), draw(INPUT).requires_grad_()
    assert x.is_contiguous() != turned
    weights = torch.randn(rows, TOKENS * heads, OUTPUT, generator=generator)
    expected = y.clone()
    for part in parts:
        place = (slice(part.start, part.stop), slice(0, part.length * heads))
        weights[part.start : part.stop, part.length * heads :] = 0
        own = x[place]
        if part.dropout is not None:
            p = DROPOUT[part.adapter]
            mask = keep_mask(tuple(own.shape), p, part.dropout, MODULE, inputs_per_token=heads)
            of_heads = mask.view(mask.shape[0], -1, heads, INPUT)
            assert not torch.equal(of_heads[:, :, 0], of_heads[:, :, 1])
            own = own * mask / keep_share(p)
        a, b = layer.lora_A[part.adapter].weight, layer.lora_B[part.adapter].weight
        expected[place] = expected[place] + layer.scaling[part.adapter] * own @ a.t() @ b.t()
    matrices = [matrix[arm].weight for arm in "abcd" for matrix in (layer.lora_A, layer.lora_B)]
    grads = torch.autograd.grad((expected * weights).sum(), (y, x, *matrices))

    groups = groups_of(parts, stacks)
    with torch.no_grad():
        alone = add_stacked(y.detach().clone(), x, groups, MODULE, heads)
    out = add_stacked(y * 1.0, x, groups, MODULE, heads)
    (out * weights).sum().backward()
    assert torch.equal(out, alone)
    for part in parts:
        place = (slice(part.start, part.stop), slice(0, part.length * heads))
        torch.testing.assert_close(out[place], expected[place], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.grad, grads[0])
    torch.testing.assert_close(x.grad, grads[1], rtol=1e-5, atol=1e-5)
    mine = gradients(stacks)
    names = [(arm, side) for arm in "abcd" for side in ("lora_A", "lora_B")]
    for key, value in zip(names, grads[2:], strict=True):
        torch.testing.assert_close(mine[key], value, rtol=1e-5, atol=1e-4)


def test_gradients_of_two_passes_are_added(stacked):
    _, stacks = stacked
    for _ in range(2):
        y, x = inputs(6)
        add_stacked(y * 1.0, x, groups_of(segments(keys=False), stacks), MODULE).sum().backward()
    twice = gradients(stacks)
    for stack in stacks:
        stack.gradients.zero_()
    y, x = inputs(6)
    add_stacked(y * 1.0, x, groups_of(segments(keys=False), stacks), MODULE).sum().backward()
    for key, value in gradients(stacks).items():
        torch.testing.assert_close(2 * value, twice[key])


def test_without_gradients_the_values_are_the_same(stacked):
    _, stacks = stacked
    y, x = inputs(6)
    parts = groups_of(segments(), stacks)
    with_gradient = add_stacked(y * 1.0, x, parts, MODULE).detach()
    with torch.no_grad():
        assert torch.equal(add_stacked(y * 1.0, x, parts, MODULE), with_gradient)


def test_a_frozen_input_gets_no_gradient(stacked):
    _, stacks = stacked
    y, x = inputs(6)
    add_stacked(y.detach().clone(), x.detach(), groups_of(segments(), stacks), MODULE).sum().backward()
    assert x.grad is None
    assert gradients(stacks)["a", "lora_A"].any()


@pytest.mark.parametrize("bad", "abcd")
def test_nan_in_one_arms_rows_and_matrices_stays_there_in_both_directions(stacked, bad):
    layer, stacks = stacked
    parts = segments()
    y, x = inputs(6)
    with torch.no_grad():
        own = next(part for part in parts if part.adapter == bad)
        x[own.start, 0, 0] = torch.nan
        layer.lora_B[bad].weight[0, 0] = torch.inf
    out = add_stacked(y * 1.0, x, groups_of(parts, stacks), MODULE)
    out.sum().backward()
    for part in parts:
        place = slice(part.start, part.stop)
        finite = part.adapter != bad
        assert bool(torch.isfinite(out[place]).all()) == finite
        assert bool(torch.isfinite(x.grad[place]).all()) == finite
        assert bool(torch.isfinite(gradients(stacks)[part.adapter, "lora_A"]).all()) == finite


def test_matrices_stay_in_fp32_under_a_16_bit_base():
    layer = Layer("ab", seed=1)
    members = [Member.of([(MODULE, layer)], arm) for arm in "ab"]
    stacks = Stacks.__new__(Stacks)
    stacks._stacks = [Stack({MODULE: layer}, members, torch.bfloat16)]
    (stack,) = stacks
    parts = segments("ab")
    y, x = inputs(4)
    half = [each.detach().bfloat16().requires_grad_() for each in (y, x)]
    out = add_stacked(half[0] * 1.0, half[1], groups_of(parts, stacks), MODULE)
    assert out.dtype == torch.bfloat16
    assert (stack.values.dtype, stack.gradients.dtype, stack.weights().dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    expected = reference(y, x, parts, layer)
    torch.testing.assert_close(own_tokens(out.float(), parts), own_tokens(expected, parts), rtol=0.05, atol=0.3)
    own_tokens(out, parts).sum().backward()
    grads = torch.autograd.grad(own_tokens(expected, parts).sum(), [layer.lora_A["a"].weight, layer.lora_B["a"].weight])
    mine = gradients(stacks)
    for side, value in zip(("lora_A", "lora_B"), grads, strict=True):
        assert float((mine["a", side] - value).norm() / value.norm()) < 0.05
    assert half[1].grad.dtype == torch.bfloat16


def test_arms_of_equal_shape_take_one_group_whatever_their_number():
    layer = Layer("abcd", seed=1)
    stack = Stack({MODULE: layer}, [Member.of([(MODULE, layer)], arm) for arm in "abcd"], torch.float32)
    stacks = Stacks.__new__(Stacks)
    stacks._stacks = [stack]
    parts = [Segment(adapter=arm, start=n, stop=n + 1, length=50 + n) for n, arm in enumerate("abcd")]
    assert [(group.first, group.last, group.length) for group in _groups(parts, stacks)] == [(0, 4, 53)]
    uneven = [Segment(adapter=arm, start=n, stop=n + 1, length=10 * (1 + n)) for n, arm in enumerate("abcd")]
    # On a CPU padding costs more than a product of its own.
    assert [group.arms for group in _groups(uneven, stacks)] == [1, 1, 1, 1]


def test_peft_sees_its_matrices_and_they_are_views():
    layer = Layer("ac", seed=1)
    before = {
        arm: (layer.lora_A[arm].weight.detach().clone(), layer.lora_B[arm].weight.detach().clone()) for arm in "ac"
    }
    parameters = {arm: (layer.lora_A[arm].weight, layer.lora_B[arm].weight) for arm in "ac"}
    stack = Stack({MODULE: layer}, [Member.of([(MODULE, layer)], arm) for arm in "ac"], torch.float32)
    for arm in "ac":
        assert (layer.lora_A[arm].weight, layer.lora_B[arm].weight) == parameters[arm]
        for parameter, value in zip(parameters[arm], before[arm], strict=True):
            assert torch.equal(parameter, value)
            assert parameter.requires_grad
            assert parameter.untyped_storage().data_ptr() == stack.values.untyped_storage().data_ptr()
    layout, rows, narrow = stack.keep(["c"])
    assert (layout.rank, rows, narrow.rank, stack.values.shape) == (3, [1], 2, (1, 2 * (INPUT + OUTPUT)))
    assert torch.equal(layer.lora_B["c"].weight, before["c"][1])
    assert layer.lora_B["c"].weight.untyped_storage().data_ptr() == stack.values.untyped_storage().data_ptr()


def test_a_layout_places_every_number_once():
    layout = Layout({"x": (3, 5), "y": (2, 2)}, 4)
    flat = torch.zeros(2, layout.size)
    for module in ("x", "y"):
        layout.a(flat, module).add_(1)
        layout.b(flat, module).add_(1)
    assert torch.equal(flat, torch.ones_like(flat))
    assert layout.size == 4 * (3 + 5 + 2 + 2)
    assert layout.b_start == 4 * (3 + 2)
    assert math.prod(layout.b(flat, "x").shape[1:]) == 4 * 5
