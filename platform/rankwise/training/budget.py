"""How many arms fit into memory together, and in how many forward passes.

    plan = plan_pack(base, tasks)
    logger.info(plan.estimate.text())
    outcomes = train_pack(base, plan.fits, directory=..., parts=plan.parts)

What an arm keeps for the whole training (its matrices, their gradients, the optimizer's moments) decides whether it
can be in the pack. What a forward pass keeps until its backward pass only decides in how many passes the arms go
through the base, one after another, in each micro-step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from rankwise.files import format_size
from rankwise.modeling.base import LoadedBase, linear_modules
from rankwise.modeling.estimate import ActivationShape, AdapterShape, match_targets
from rankwise.modeling.lora.lean import dequantized_bytes, free_memory, is_dequantized
from rankwise.training.arm import ArmTask, state_bytes
from rankwise.training.step import Passes

logger = logging.getLogger(__name__)
CPU_SHARE = 0.75
"""Of a machine's free memory: other processes live there too, and none of them is told before the kernel kills one."""
CUDA_SHARE = 0.9
"""Of a GPU's free memory: the rest is what the allocator cannot use for its pieces."""
CPU_TOKENS = 1280
"""Tokens of a forward pass on a CPU: more of them at once need memory and gain nothing.

SmolLM2-135M, 8 arms of 4 rows of 77 tokens, two cores with AVX512, CPU seconds of a step of an arm and the largest
memory of the process: 1.74 and 2.0 GiB with 1,232 tokens a pass, 1.82 and 3.4 GiB with 2,464 (noise: the machine was
busy). Smaller passes do cost: 7 % more with 308 tokens than with 616 where weights are kept dequantized.
"""


@dataclass(frozen=True, kw_only=True)
class PackEstimate:
    """Memory of a pack in bytes, by what it is for.

    Attributes:
        base: Weights as they are loaded, and what of them is dequantized at a time.
        states: The arms' matrices, gradients and optimizers.
        activations: What the largest forward pass keeps, and the backward pass through one layer.
        logits: Logits of supervised positions in that pass, with their gradient.
        free: What there is for everything but the base; None where it is not limited.
        arms: How many arms.
        passes: In how many forward passes they go through the base in a micro-step.
        tokens: Tokens of the largest pass, with padding.
    """

    base: int
    states: int
    activations: int
    logits: int
    free: int | None
    arms: int
    passes: int
    tokens: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.states + self.activations + self.logits

    def text(self) -> str:
        """One line for people."""
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        arms = "1 arm" if self.arms == 1 else f"{self.arms} arms"
        free = "" if self.free is None else f", {_size(self.free)} free beside the base"
        return (
            f"memory {_size(self.total)}: base {_size(self.base)}, {arms} {_size(self.states)}, activations "
            f"{_size(self.activations)} ({passes} of up to {self.tokens} tokens), logits {_size(self.logits)}{free}"
        )


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """What goes together.

    Attributes:
        fits: The arms to train now, in their order; at least one.
        left: The arms whose states do not fit beside them.
        passes: How the arms go through the base.
        estimate: Memory of the arms that fit.
    """

    fits: tuple[ArmTask, ...]
    left: tuple[ArmTask, ...]
    passes: Passes
    estimate: PackEstimate

    @property
    def parts(self) -> int:
        """Into how many runs memory makes the arms be cut."""
        return self.passes.parts


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one arm brings to a pass, at most, and keeps."""

    rows: int
    length: int
    positions: int
    adapter: AdapterShape
    states: int


def plan_pack(
    base: LoadedBase,
    tasks: Sequence[ArmTask],
    *,
    free_bytes: int | None = None,
    token_budget: int | None = None,
) -> PackPlan:
    """Choose which arms train together over a loaded base, and in how many passes.

    Args:
        base: The base, without adapters of these arms.
        tasks: The arms, the most wanted first.
        free_bytes: Memory for everything but the base; what the device has free, less a margin, when left out.
        token_budget: Tokens of a forward pass, with padding; on a CPU `CPU_TOKENS` when left out, on a GPU what fits.

    Raises:
        ConfigError: An arm's target modules are not those of the base.
        ValueError: No arms.
    """
    if not tasks:
        raise ValueError("a pack needs at least one arm")
    linear = linear_modules(base.model)
    shape = ActivationShape.of(
        base.model.config, linear, itemsize=base.compute_dtype.itemsize, cpu=base.device.type == "cpu"
    )
    max_tokens = default_token_budget(base) if token_budget is None else token_budget
    shares = [_share(task, linear) for task in tasks]
    kept = dequantized_bytes(base.model, tokens=usual_pass(tasks, max_tokens))
    free = free_for_packs(base, kept) if free_bytes is None else free_bytes
    checkpointing = any(task.spec.training.gradient_checkpointing for task in tasks)

    def size(group: Sequence[_Share]) -> tuple[int, int]:
        length = max(each.length for each in group)
        return shape.peak(
            [(each.rows, length, each.adapter) for each in group],
            sum(each.positions for each in group),
            gradient_checkpointing=checkpointing,
        )

    fitting, states, one = 1, shares[0].states, sum(size(shares[:1]))
    for each in shares[1:]:
        # An arm that goes through the base by itself is the least that a pass can be.
        one = max(one, sum(size([each])))
        if states + each.states + one > free:
            break
        states += each.states
        fitting += 1
    chosen = shares[:fitting]
    passes = Passes(max_tokens=max_tokens)
    while passes.parts < fitting and any(states + sum(size(group)) > free for group in _split(passes, chosen)):
        passes = replace(passes, parts=passes.parts + 1)
    split = list(_split(passes, chosen))
    activations, logits = max(map(size, split), key=sum)
    estimate = PackEstimate(
        base=base.memory_bytes + kept,
        states=states,
        activations=activations,
        logits=logits,
        free=free,
        arms=fitting,
        passes=len(split),
        tokens=max(map(_tokens, split)),
    )
    if states + activations + logits > free:
        logger.warning("the estimate says that not even one arm fits: %s", estimate.text())
    return PackPlan(fits=tuple(tasks[:fitting]), left=tuple(tasks[fitting:]), passes=passes, estimate=estimate)


def usual_pass(tasks: Sequence[ArmTask], max_tokens: int | None) -> int:
    """Tokens of the largest pass of these arms, with padding, in a usual micro-step; memory may make it smaller.

    It follows from the arms and their data alone. A single long row does not decide, as it does for what memory must
    hold: of n rows that are drawn, the longest is as often above the quantile 0.5^(1/n) of all lengths as below it.
    """
    sizes = [_usual_rows_and_length(task) for task in tasks]
    groups = Passes(max_tokens=max_tokens).split(sizes, lambda each: each)
    return max(sum(rows for rows, _ in group) * max(length for _, length in group) for group in groups)


def free_for_packs(base: LoadedBase, dequantized: int) -> int:
    """Bytes that a pack over a loaded base may take, beside the base and so many bytes of dequantized weights."""
    if base.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.device)
        unused = torch.cuda.memory_reserved(base.device) - torch.cuda.memory_allocated(base.device)
        return int(CUDA_SHARE * (free + unused))
    return int(CPU_SHARE * (free_memory() - (0 if is_dequantized(base.model) else dequantized)))


def default_token_budget(base: LoadedBase) -> int | None:
    """Tokens of a forward pass when nobody says how many: on a GPU as many as fit."""
    return CPU_TOKENS if base.device.type == "cpu" else None


def _share(task: ArmTask, linear: dict[str, tuple[int, int]]) -> _Share:
    spec = task.spec
    targets = match_targets(linear, spec.lora.target_modules)
    rows, length = _rows_and_length(task)
    matrices = [spec.lora.r * side for shape in targets.values() for side in shape]
    return _Share(
        rows=rows,
        length=length,
        positions=rows * max(int(row.supervised.sum()) for row in task.train),
        adapter=AdapterShape(
            inputs={name: inputs for name, (inputs, _) in targets.items()},
            r=spec.lora.r,
            dropout=spec.lora.lora_dropout > 0,
        ),
        states=state_bytes(matrices, spec.training),
    )


def _rows_and_length(task: ArmTask) -> tuple[int, int]:
    """Rows of a micro-batch, and tokens of the longest row: the longest ones may come together."""
    rows = min(task.spec.training.per_device_train_batch_size, len(task.train))
    return rows, max(len(row.input_ids) for row in task.train)


def _usual_rows_and_length(task: ArmTask) -> tuple[int, int]:
    """Rows of a micro-batch, and the median of the longest row's tokens."""
    rows, _ = _rows_and_length(task)
    lengths = sorted(len(row.input_ids) for row in task.train)
    return rows, lengths[math.ceil(len(lengths) * 0.5 ** (1 / rows)) - 1]


def _split(passes: Passes, shares: Sequence[_Share]) -> Iterator[list[_Share]]:
    return passes.split(shares, lambda each: (each.rows, each.length))


def _tokens(group: Sequence[_Share]) -> int:
    return sum(each.rows for each in group) * max(each.length for each in group)


def _size(count: int) -> str:
    return format_size(count, unit="GiB") if count >= 1 << 30 else format_size(count, ".0f", unit="MiB")
