"""LoRA arithmetic on the rows of a batch: adapter by adapter, and for the stacked arms of a pack in batched products.

Letters: `B` rows, `T` tokens, `k` arms of a group, `N` tokens of each of them, `I` and `O` features, `R` rank. Where a
layer has several inputs for each token, such as heads (`row_shape`), `T` and `N` count these.

    y[rows of arm i]  +=  s_i * (drop_i(x[rows of arm i]) A_i^T) B_i^T

`add_lora` is the formula, adapter by adapter, for adapters that are not in a `Stack`: those that are evaluated or used
for inference.

`add_stacked` is what trains. A `Group` is a run of arms of one stack whose rows follow one another in the batch; its
matrices are views of the stack with an arm axis first, so a group takes two batched products in the forward pass and
four in the backward pass, however many arms it has. The sum is taken in place into the base layer's output. Gradients
of matrices are added to the stack's gradients, past autograd: one tensor for each matrix would be one launch for each.
Of the input after dropout nothing is kept: on a GPU masks are looked up again in the backward pass; on a CPU they stay,
a byte an element. Nothing is masked by multiplication across arms (NaN * 0 is NaN): an arm's products read its own rows
only.

On a GPU the arms of a group may differ in length, since padding costs less than a launch there. On a CPU a group has
equal lengths and either dropout or none.

Measured on one core with AVX512, forward and backward of a module of 576 by 576, rank 8, 80 tokens an arm: batched
products 0.54 ms for eight arms, 0.14 ms for two, 0.072 ms for one; a loop over arms 0.63, 0.16 and 0.082 ms. Tried
before: one product over the concatenated A of all arms is as much arithmetic as all that a loop does, and a
block-diagonal B would let NaN leak from arm to arm; one dropped input for q, k and v would tie masks together that peft
draws apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn import functional

from rankwise.compat.torch import is_view
from rankwise.modeling.lora.draws import (
    DropoutKey,
    choose_patterns,
    gather_masks,
    keep_mask,
    keep_share,
    pattern_table,
    spread_patterns,
)
from rankwise.modeling.lora.stacks import Stack


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One adapter's rows as one layer sees them.

    Attributes:
        start: First row.
        stop: Row after the last.
        length: Leading columns that the rows use; the rest is padding for longer rows of other arms.
        scaling: `alpha / r`, or `alpha / sqrt(r)`.
        p: Dropout probability; 0 for none.
        key: The dropout's key; None for none.
        module: Full name of the module.
        inputs_per_token: How many of the columns of `length` belong to each token.
    """

    start: int
    stop: int
    length: int
    scaling: float
    p: float
    key: DropoutKey | None
    module: str
    inputs_per_token: int = 1

    @property
    def factor(self) -> float:
        """Scaling of the product, with dropout's division by the share that is kept."""
        return self.scaling if self.key is None else self.scaling / keep_share(self.p)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The adapter's part of (B, T, I) after dropout."""
        part = x[self.start : self.stop, : self.length]
        if self.key is None or self.p == 0.0:
            return part
        shape = (self.stop - self.start, self.length, x.shape[-1])
        return part * keep_mask(shape, self.p, self.key, self.module, x.device, inputs_per_token=self.inputs_per_token)


def add_lora(y: torch.Tensor, x: torch.Tensor, slices: list[Slice], matrices: list[torch.Tensor]) -> torch.Tensor:
    """Add the adapters' outputs to the base layer's.

    Args:
        y: Output of the base layer, (B, T, O); it is changed in place where no gradients are wanted.
        x: Input of the layer, (B, T, I).
        slices: The adapters' rows.
        matrices: A (R, I) and B (O, R) of each slice in turn, in fp32 or the dtype of `x`.

    Returns:
        The sum, (B, T, O).
    """
    if torch.is_grad_enabled():
        y = y.clone()
    for part, a, b in zip(slices, matrices[::2], matrices[1::2], strict=True):
        inner = functional.linear(part.read(x), a.to(x.dtype)).to(y.dtype)
        own = y[part.start : part.stop, : part.length]
        own.add_(functional.linear(inner, b.to(y.dtype)), alpha=part.factor)
    return y


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class _Views:
    """Of a group in one module: A (k, R, I) and B transposed (k, R, O), their gradients, and what products lack."""

    a: torch.Tensor
    b: torch.Tensor
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    factors: torch.Tensor | None

    def scale(self, inner: torch.Tensor) -> torch.Tensor:
        """Scale inner products in place, as far as B is not."""
        return inner if self.factors is None else inner.mul_(self.factors.to(inner.dtype))


@dataclass(eq=False, kw_only=True)
class Group:
    """A run of arms of one stack whose rows follow one another in a batch, each arm as many as the others.

    Attributes:
        stack: The stack.
        first: Row of the first arm in the stack.
        last: Row after that of the last arm.
        start: First row in the batch.
        stop: Row after the last.
        length: Leading tokens that any of the arms uses; None for all.
        drops: Whether dropout is applied.
        patterns: For each module of the stack the dropout pattern of each token, (M, rows, T).
        inputs_per_token: How many inputs a token has in the layer at hand.
    """

    stack: Stack
    first: int
    last: int
    start: int
    stop: int
    length: int | None
    drops: bool
    patterns: torch.Tensor | None = None
    inputs_per_token: int = 1
    _views: dict[str, _Views] = field(default_factory=dict)

    def prepare(self, words: torch.Tensor | None) -> None:
        """Choose the dropout patterns of all modules from the words of the batch's tokens, (B, T), and make weights."""
        self.stack.weights()
        if not self.drops:
            return
        assert words is not None
        own = choose_patterns(words[self.start : self.stop], self.stack.module_words)
        self.patterns = own if len(self.stack.ps) == 1 else own + self._offsets()

    @property
    def arms(self) -> int:
        """Number of arms."""
        return self.last - self.first

    @property
    def rows(self) -> int:
        """Rows of each arm."""
        return (self.stop - self.start) // self.arms

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The group's part of (B, T, F) as (k, N, F); a view where it can be."""
        part = tensor[self.start : self.stop, : self.tokens(tensor)]
        if self.rows == 1:
            return part
        return part.reshape(self.arms, -1, tensor.shape[-1])

    def covers(self, tensor: torch.Tensor) -> bool:
        """Whether the group's part of (B, T, F) is contiguous, so that products can be written into it."""
        return self.tokens(tensor) == tensor.shape[1] or self.rows == 1

    def mask(self, x: torch.Tensor, module: str) -> torch.Tensor | None:
        """The dropout masks of (k, N, I); None without dropout."""
        if self.patterns is None:
            return None
        tokens = self.tokens(x) // self.inputs_per_token
        patterns = self.patterns[self.stack.module_index[module], :, :tokens]
        if self.inputs_per_token > 1:
            # Without the offset, which depends on the other arms.
            offsets = self._offsets()
            patterns = spread_patterns(patterns - offsets, self.inputs_per_token) + offsets
        table = pattern_table(self.stack.ps, x.device)
        return gather_masks(table, patterns.reshape(self.arms, -1), x.shape[-1])

    def views(self, module: str) -> _Views:
        """The group's part of the stack's matrices, made once a pass."""
        found = self._views.get(module)
        if found is None:
            stack, arms = self.stack, slice(self.first, self.last)
            weights, index = stack.weights(), stack.module_index[module]
            factors = None
            if not stack.folded:
                factors = stack.factors[arms, index] if self.drops else stack.factors[arms, index] * stack.shares[arms]
            elif stack.drops and not self.drops:
                factors = stack.shares[arms]
            found = self._views[module] = _Views(
                a=stack.layout.a(weights, module)[arms],
                b=stack.layout.b(weights, module)[arms],
                grad_a=stack.layout.a(stack.gradients, module)[arms],
                grad_b=stack.layout.b(stack.gradients, module)[arms],
                factors=None if factors is None else factors.view(-1, 1, 1),
            )
        return found

    def tokens(self, tensor: torch.Tensor) -> int:
        """Leading columns of (B, T, F) that the group uses."""
        return tensor.shape[1] if self.length is None else min(self.length * self.inputs_per_token, tensor.shape[1])

    def _offsets(self) -> torch.Tensor:
        """Where the patterns of each row's probability begin, (rows, 1)."""
        return self.stack.table_offsets[self.first : self.last].repeat_interleave(self.rows)[:, None]


def add_stacked(
    y: torch.Tensor, x: torch.Tensor, groups: Sequence[Group], module: str, inputs_per_token: int = 1
) -> torch.Tensor:
    """Add the outputs of stacked adapters to the base layer's.

    Args:
        y: Output of the base layer, (B, T, O); it is changed in place if it is contiguous, unless it is a view and
            gradients are wanted: autograd refuses that for views that a function of its own has made, as bitsandbytes'
            8-bit products are.
        x: Input of the layer, (B, T, I).
        groups: The arms' rows.
        module: Full name of the module.
        inputs_per_token: How many of the columns of `T` belong to each token.

    Returns:
        The sum, (B, T, O).
    """
    if inputs_per_token > 1:
        groups = [replace(group, inputs_per_token=inputs_per_token) for group in groups]
    if torch.is_grad_enabled():
        own = y.clone(memory_format=torch.contiguous_format) if is_view(y) else y.contiguous()
        return _AddStacked.apply(own, x, groups[0].stack.anchor, groups, module)  # type: ignore[no-any-return, no-untyped-call]
    y = y.contiguous()
    for group in groups:
        _forward(y, x, group, module, group.mask(x, module))
    return y


def _forward(y: torch.Tensor, x: torch.Tensor, group: Group, module: str, mask: torch.Tensor | None) -> torch.Tensor:
    """Add to y, and return the scaled inner products, (k, N, R)."""
    views = group.views(module)
    own = group.take(x)
    if mask is not None:
        own = own * mask
    inner = views.scale(torch.bmm(own, views.a.to(x.dtype).transpose(1, 2)))
    if group.covers(y):
        group.take(y).baddbmm_(inner.to(y.dtype), views.b.to(y.dtype))
    else:
        part = y[group.start : group.stop, : group.tokens(y)]
        part.add_(torch.bmm(inner.to(y.dtype), views.b.to(y.dtype)).view(part.shape))
    return inner


class _AddStacked(torch.autograd.Function):
    """`add_stacked` where gradients are wanted."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, anchor: torch.Tensor, groups: Sequence[Group], module: str
    ) -> torch.Tensor:
        masks = [group.mask(x, module) for group in groups]
        inners = [_forward(y, x, group, module, mask) for group, mask in zip(groups, masks, strict=True)]
        ctx.mark_dirty(y)
        ctx.groups, ctx.module = groups, module
        ctx.keeps_masks = x.device.type == "cpu"
        # All of it by autograd's own way: gradient checkpointing lets go of nothing else.
        ctx.save_for_backward(x, *inners, *(masks if ctx.keeps_masks else ()))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad, module = grads[0], ctx.module
        groups: Sequence[Group] = ctx.groups
        x, *saved = ctx.saved_tensors
        inners, masks = saved[: len(groups)], saved[len(groups) :]
        grad_x = _grad_like(x, groups) if ctx.needs_input_grad[1] else None
        for index, group in enumerate(groups):
            mask = masks[index] if ctx.keeps_masks else group.mask(x, module)
            views = group.views(module)
            own, grad_y, inner = group.take(x), group.take(grad), inners[index]
            if mask is not None:
                own = own * mask
            # Products with the rank as their rows: on a CPU they are faster than with the rank as their columns.
            grad_inner = torch.bmm(views.b.to(grad.dtype), grad_y.transpose(1, 2))
            grad_inner = views.scale(grad_inner).to(x.dtype)  # (k, R, N)
            _add_product(views.grad_a, grad_inner, own)
            _add_product(views.grad_b, inner.to(grad.dtype).transpose(1, 2), grad_y)
            if grad_x is not None:
                _put(grad_x, group, grad_inner.transpose(1, 2), views.a.to(x.dtype), mask)
        return grad, grad_x, None, None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype == right.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


def _grad_like(x: torch.Tensor, groups: Sequence[Group]) -> torch.Tensor:
    """The gradient of the input, zero where no group will write; contiguous, since groups write into views of it."""
    covered = sum((group.stop - group.start) * group.tokens(x) for group in groups)
    make = torch.empty_like if covered == x.shape[0] * x.shape[1] else torch.zeros_like
    return make(x, memory_format=torch.contiguous_format)


def _put(
    grad_x: torch.Tensor, group: Group, left: torch.Tensor, right: torch.Tensor, mask: torch.Tensor | None
) -> None:
    """Write `left @ right`, (k, N, I), after the mask, into a group's part of a gradient."""
    if group.covers(grad_x):
        target = group.take(grad_x)
        torch.bmm(left, right, out=target)
        if mask is not None:
            target.mul_(mask)
        return
    product = torch.bmm(left, right)
    part = grad_x[group.start : group.stop, : group.tokens(grad_x)]
    part.copy_((product if mask is None else product.mul_(mask)).view(part.shape))
