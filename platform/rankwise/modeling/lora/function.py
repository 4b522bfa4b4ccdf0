"""LoRA arithmetic on slices of a batch, with its own backward pass, and reproducible random numbers per adapter.

Letters: `B` rows, `T` tokens, `L` tokens of one arm's longest row (L <= T), `I` and `O` features in and out, `R` rank.

    y[rows of arm i, :L_i]  +=  s_i * (drop_i(x[rows of arm i, :L_i]) A_i^T) B_i^T

The sum is taken in place into the base layer's output, once for all arms, and one autograd node stands for all of
them: a slice assignment per arm would copy the gradient of the whole batch per arm and layer. Of the input after
dropout nothing is kept: on a GPU the mask is drawn again in the backward pass; on a CPU, where a draw costs more than a
byte an element, the mask stays. Nothing is masked by multiplication across arms (NaN * 0 is NaN): rows of other arms
are never read.

Tried on one AVX2 core, CPU time of one module of SmolLM2 with 8 arms (r 2 to 16, dropout 0.05, 80 tokens a row):

| | 1 row an arm | 4 rows |
|---|---|---|
| products as they are written in the formula, bool masks, a zeroed gradient of the input | 6.7 ms | 19.7 ms |
| rank as rows of a product, masks as numbers, products written where they belong | 5.9 ms | 14.4 ms |

For comparison, the base's own products of that module, 576 by 576, take about 10 ms for the 640 tokens of the first
column. What gave too little: `torch.bmm` over arms of padded rank (0.19 ms against 0.21 to 0.26 ms for eight single
products, and all arms would need the same rows); numpy's SFC64 in place of Philox (66 against 99 microseconds a mask,
half a percent of a step, and other masks than before). Reckoned only: one product over the concatenated A of all arms
is as much arithmetic as all that the loop does (each row times the A of each arm), and a block-diagonal B would let NaN
leak from arm to arm; one dropped input for q, k and v would tie masks together that peft draws apart; all calls of
Python and torch's dispatch in the loop are 1.5 % of a step of 8 arms.

`torch.nn.Dropout` takes no generator, and the global generator's state depends on everything that drew before: on the
other arms of the pack, on whether a layer is recomputed, on how often a run was interrupted. Here each draw has a key
(arm seed, step, micro-step, full module name), a counter-based generator (Philox) is keyed by a hash of it, and the
draw is repeated wherever it is needed again instead of being kept.

The bits come from numpy's Philox, whose raw stream is fixed for all versions and machines; nothing here goes through
`numpy.random.Generator`, whose distributions may change. On CUDA the masks come from torch's generator of the device:
a draw on the CPU and a copy would take longer than the layer (33 million elements in one layer of an 8B model). They
are reproducible on the same kind of device only.

Measured on two AVX2 cores, for 8 rows of 45 tokens in SmolLM2-135M (120 target modules, 207,360 elements each):
`bernoulli_` with a torch generator 1.1 ms a module, this 0.2 ms, of which 0.01 ms are for the key.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from rankwise.compat.torch import is_view

_STEPS = 1 << 16
"""Dropout probabilities are rounded to a multiple of 1 / _STEPS: four draws come out of one 64-bit word."""


@dataclass(frozen=True, kw_only=True)
class DropoutKey:
    """What a dropout mask depends on beside the module it is for.

    Attributes:
        seed: The arm's seed.
        step: The arm's optimizer step, counted from 0.
        micro_step: The micro-batch within the step, counted from 0.
    """

    seed: int
    step: int
    micro_step: int


def _digest(*parts: object) -> int:
    """A 128-bit number that names the parts."""
    text = "\x00".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _words(key: int, count: int) -> np.ndarray:
    """`count` 64-bit words of the Philox stream of `key`."""
    return np.asarray(np.random.Philox(key=key).random_raw(count), dtype="<u8")


def uniform(shape: tuple[int, ...], bound: float, *parts: object) -> torch.Tensor:
    """Draw fp32 numbers from U(-bound, bound) on the CPU, as a pure function of the shape and `parts`.

    A prefix of a longer draw with the same parts is the shorter draw: the rank-4 adapter of a seed starts with the
    first four rows of the rank-8 adapter.
    """
    count = int(np.prod(shape))
    # 24 bits are what fp32 can hold of a number in [0, 1).
    unit = (_words(_digest("init", *parts), count) >> np.uint64(40)).astype(np.float64) / (1 << 24)
    return torch.from_numpy(((2.0 * unit - 1.0) * bound).astype(np.float32)).reshape(shape)


def keep_share(p: float) -> float:
    """The share of elements that `keep_mask` keeps on average, which is what the kept ones are divided by."""
    return 1.0 - _threshold(p) / _STEPS


def _threshold(p: float) -> int:
    if not 0.0 < p < 1.0:
        raise ValueError(f"a dropout mask needs a probability in (0, 1), got {p}")
    return min(max(round(p * _STEPS), 1), _STEPS - 1)


def keep_mask(
    shape: tuple[int, ...], p: float, key: DropoutKey, module: str, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Draw which elements dropout keeps.

    Args:
        shape: Rows, tokens and features of the arm's own slice, at the arm's own longest length.
        p: Probability of dropping an element, in (0, 1).
        key: The arm's seed, step and micro-step.
        module: Full name of the module in the base.
        device: Where the mask is needed.

    Returns:
        A bool tensor on `device`, True where the element is kept.
    """
    number = _digest("dropout", key.seed, key.step, key.micro_step, module)
    device = torch.device(device)
    if device.type == "cuda":
        generator = torch.Generator(device=device)
        generator.manual_seed(number & (1 << 63) - 1)
        drawn = torch.randint(0, _STEPS, shape, generator=generator, device=device, dtype=torch.int32)
        return drawn >= _threshold(p)
    count = int(np.prod(shape))
    words = _words(number, (count + 3) // 4).view("<u2")[:count]
    return torch.from_numpy(words >= np.uint16(_threshold(p))).reshape(shape).to(device)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One arm's rows as one layer sees them.

    Attributes:
        start: First row.
        stop: Row after the last.
        length: Leading tokens that the arm's rows use (`L`); the rest is padding for longer rows of other arms.
        scaling: `alpha / r`, or `alpha / sqrt(r)`.
        p: Dropout probability; 0 for none.
        key: The dropout's key; None for none.
        module: Full name of the module.
    """

    start: int
    stop: int
    length: int
    scaling: float
    p: float
    key: DropoutKey | None
    module: str

    @property
    def drops(self) -> bool:
        """Whether dropout is drawn."""
        return self.key is not None and self.p > 0.0

    @property
    def factor(self) -> float:
        """Scaling of the product, with dropout's division by the share that is kept."""
        return self.scaling / keep_share(self.p) if self.drops else self.scaling

    def mask(self, x: torch.Tensor) -> torch.Tensor | None:
        """The dropout mask of (b, L, I) for an input of (B, T, I); None without dropout."""
        if self.key is None or self.p == 0.0:
            return None
        shape = (self.stop - self.start, self.length, x.shape[-1])
        # As numbers: a product with a bool tensor takes twice as long.
        return keep_mask(shape, self.p, self.key, self.module, x.device).view(torch.uint8)

    def read(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The arm's part of (B, T, I) as (b * L, I), after dropout."""
        part = x[self.start : self.stop, : self.length]
        if mask is not None:
            part = part * mask
        return part.reshape(-1, x.shape[-1])

    def add_product(self, y: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> None:
        """Add `factor * left @ right`, a (b * L, O), to the arm's part of y (B, T, O), in place."""
        part = y[self.start : self.stop, : self.length]
        if part.is_contiguous():
            part.view(-1, y.shape[-1]).addmm_(left, right, alpha=factor)
        else:
            part.add_((left @ right).view(part.shape), alpha=factor)


def add_lora(y: torch.Tensor, x: torch.Tensor, slices: list[Slice], matrices: list[torch.Tensor]) -> torch.Tensor:
    """Add the adapters' outputs to the base layer's.

    Args:
        y: Output of the base layer, (B, T, O); it is changed in place, unless it is a view and gradients are wanted:
            autograd refuses that for views that a function of its own has made, as bitsandbytes' 8-bit products are.
        x: Input of the layer, (B, T, I).
        slices: The arms' rows.
        matrices: A (R, I) and B (O, R) of each slice in turn, in fp32 or the dtype of `x`.

    Returns:
        The sum, (B, T, O).
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(matrix.requires_grad for matrix in matrices)):
        return _AddLora.apply(y.clone() if is_view(y) else y, x, slices, *matrices)  # type: ignore[no-any-return, no-untyped-call]
    for index, part in enumerate(slices):
        _forward(y, x, part, part.mask(x), matrices[2 * index], matrices[2 * index + 1])
    return y


def _forward(
    y: torch.Tensor, x: torch.Tensor, part: Slice, mask: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    inner = functional.linear(part.read(x, mask), a.to(x.dtype))
    part.add_product(y, inner.to(y.dtype), b.to(y.dtype).t(), part.factor)
    return inner


class _AddLora(torch.autograd.Function):
    """`add_lora` where gradients are wanted."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, slices: list[Slice], *matrices: torch.Tensor
    ) -> torch.Tensor:
        masks = [part.mask(x) for part in slices]
        inners = [
            _forward(y, x, part, mask, matrices[2 * index], matrices[2 * index + 1])
            for index, (part, mask) in enumerate(zip(slices, masks, strict=True))
        ]
        ctx.mark_dirty(y)
        ctx.slices = slices
        ctx.keeps_masks = x.device.type == "cpu"
        # All of it by autograd's own way: gradient checkpointing lets go of nothing else.
        ctx.save_for_backward(x, *matrices, *inners, *(masks if ctx.keeps_masks else ()))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad = grads[0]
        slices: list[Slice] = ctx.slices
        x, *saved = ctx.saved_tensors
        count = len(slices)
        matrices, inners, masks = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
        grad_x = _grad_like(x, slices) if ctx.needs_input_grad[1] else None
        grad_matrices: list[torch.Tensor | None] = []
        for index, part in enumerate(slices):
            a, b = matrices[2 * index].to(x.dtype), matrices[2 * index + 1].to(grad.dtype)
            mask = masks[index] if ctx.keeps_masks else part.mask(x)
            grad_y = grad[part.start : part.stop, : part.length].reshape(-1, grad.shape[-1])
            needs_a, needs_b = ctx.needs_input_grad[3 + 2 * index : 5 + 2 * index]
            # Products with the rank as their rows: with the rank as their columns they take two to four times as long.
            grad_inner = (b.t().contiguous() @ grad_y.t()).mul_(part.factor).to(x.dtype)  # (R, b * L)
            grad_matrices.append((grad_inner @ part.read(x, mask)).to(matrices[2 * index].dtype) if needs_a else None)
            grad_b = (inners[index].t().to(grad.dtype) @ grad_y).mul_(part.factor) if needs_b else None
            grad_matrices.append(None if grad_b is None else grad_b.t().to(matrices[2 * index + 1].dtype))
            if grad_x is not None:
                _put(grad_x[part.start : part.stop, : part.length], grad_inner.t(), a, mask)
        return grad, grad_x, None, *grad_matrices


def _grad_like(x: torch.Tensor, slices: list[Slice]) -> torch.Tensor:
    """The gradient of the input, zero where no slice will write."""
    covered = sum((part.stop - part.start) * part.length for part in slices)
    return torch.empty_like(x) if covered == x.shape[0] * x.shape[1] else torch.zeros_like(x)


def _put(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Write `left @ right`, a (b * L, I), after the mask, into an arm's part of a gradient."""
    if target.is_contiguous():
        torch.mm(left, right, out=target.view(-1, target.shape[-1]))
        if mask is not None:
            target.mul_(mask)
        return
    product = (left @ right).view(target.shape)
    target.copy_(product if mask is None else product.mul_(mask))
