"""Memory planning: which arms fit into memory together, and in how many forward passes.

    plan = plan_pack(base, tasks)
    logger.info(plan.estimate.text())
    outcomes = train_pack(base, plan.fits, directory=...)

Memory that an arm needs for the whole training (matrices, gradients, optimizer moments) decides whether it joins the
pack. Memory from a forward pass to its backward pass decides into how many passes a micro-step is split.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from rankwise.files import format_size
from rankwise.modeling.base import LoadedBase, linear_modules
from rankwise.modeling.estimate import ActivationShape, AdapterShape, match_targets
from rankwise.modeling.lora.lean import dequantized_bytes, free_memory, is_dequantized
from rankwise.modeling.lora.stacks import rank_class
from rankwise.training.arm import ArmTask
from rankwise.training.optimizer import IN_8_BIT, state_bytes
from rankwise.training.step import Passes, release_freed_memory

logger = logging.getLogger(__name__)
CPU_SHARE = 0.75  # of free memory; the rest is for other processes
CUDA_SHARE = 0.9  # of free memory; the rest is lost to fragmentation
GROWTH_BYTES = 64 << 20
"""What a CPU's process gains in its first steps: kernels of the product library, threads, caches. Measured."""
ALLOCATOR_SHARE = 0.15
"""Share of a pass's tensors that glibc adds by blocks it cannot reuse (0.2 in float32, 0.1 in bfloat16). Measured."""
_SMAPS = Path("/proc/self/smaps")
CPU_TOKENS = 1280
"""Tokens of a forward pass on a CPU: larger passes need more memory and are not faster (see docs/benchmarks.md)."""

CUDA_TOKENS = 8192
"""Tokens of a forward pass on a GPU.

A layer takes about 190 launches, or 1 ms of a CPU's time, and the products of an 8B model's layer with 8,192 tokens
7 TFLOP, or 10 ms of an H100. From there on more tokens a pass gain nothing, and activations grow.
"""


@dataclass(frozen=True, kw_only=True)
class PackEstimate:
    """Estimated memory of a pack, in bytes.

    `process` is what a CPU's process takes besides (`process_bytes`), 0 on a GPU. `base` includes the weights that are
    dequantized at a time, `states` are the arms' matrices, gradients and optimizers. `activations`, `logits` and
    `tokens` (with padding) are of the largest pass. `free` excludes the base.
    """

    process: int
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
        """The sum, in bytes."""
        return self.process + self.base + self.states + self.activations + self.logits

    def text(self) -> str:
        """One line for the log."""
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        arms = "1 arm" if self.arms == 1 else f"{self.arms} arms"
        free = "" if self.free is None else f", {_size(self.free)} free besides the base"
        process = f"process {_size(self.process)}, " if self.process else ""
        return (
            f"memory {_size(self.total)}: {process}base {_size(self.base)}, {arms} {_size(self.states)}, activations "
            f"{_size(self.activations)} ({passes} of up to {self.tokens} tokens), logits {_size(self.logits)}{free}"
        )


@dataclass(frozen=True, kw_only=True)
class PackPlan:
    """The arms to train now (at least one), the arms whose states do not fit, and the split into passes."""

    fits: tuple[ArmTask, ...]
    left: tuple[ArmTask, ...]
    passes: Passes
    estimate: PackEstimate


@dataclass(frozen=True, kw_only=True)
class _ArmMemory:
    """What one arm adds to a pass (`rows` of up to `length` tokens, `positions` with logits), and its states."""

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
    lean: bool | None = None,
    direct: bool = True,
) -> PackPlan:
    """Choose which arms train together over a loaded base, and in how many passes.

    Args:
        base: Without adapters of these arms.
        tasks: The arms, most important first.
        free_bytes: Memory for everything except the base; by default from the device.
        token_budget: Tokens of a forward pass, with padding; by default `default_token_budget`.
        lean: Whether feed-forwards run the lean way (`lean_feed_forwards`); by default judged by their names.
        direct: Whether logits are computed at supervised positions alone (`SupervisedLogits`).

    Raises:
        ConfigError: An arm's target modules are not in the base.
        ValueError: No arms.
    """
    if not tasks:
        raise ValueError("a pack needs at least one arm")
    linear = linear_modules(base.model)
    shape = ActivationShape.of(
        base.model.config,
        linear,
        itemsize=base.compute_dtype.itemsize,
        cpu=base.device.type == "cpu",
        lean=lean,
        direct=direct,
    )
    max_tokens = default_token_budget(base) if token_budget is None else token_budget
    ranks = _stored_ranks(tasks, linear, cpu=base.device.type == "cpu")
    copies = 0 if base.device.type == "cpu" and base.compute_dtype == torch.float32 else base.compute_dtype.itemsize
    shares = [_share(task, linear, rank, copies) for task, rank in zip(tasks, ranks, strict=True)]
    kept = dequantized_bytes(base.model, tokens=typical_pass_tokens(tasks, max_tokens))
    free = free_pack_memory(base, kept) if free_bytes is None else free_bytes
    checkpointing = any(task.spec.training.gradient_checkpointing for task in tasks)

    def size(group: Sequence[_ArmMemory]) -> tuple[int, int]:
        length = max(arm.length for arm in group)
        return shape.peak(
            [(arm.rows, length, arm.adapter) for arm in group],
            sum(arm.positions for arm in group),
            gradient_checkpointing=checkpointing,
        )

    fitting, states, smallest = 1, shares[0].states, sum(size(shares[:1]))
    for arm in shares[1:]:
        smallest = max(smallest, sum(size([arm])))
        if states + arm.states + smallest > free:
            break
        states += arm.states
        fitting += 1
    chosen = shares[:fitting]
    passes = Passes(max_tokens=max_tokens)
    while passes.parts < fitting and any(states + sum(size(group)) > free for group in _split(passes, chosen)):
        passes = replace(passes, parts=passes.parts + 1)
    split = list(_split(passes, chosen))
    activations, logits = max(map(size, split), key=sum)
    estimate = PackEstimate(
        process=process_bytes(base, kept, activations + logits),
        base=base.memory_bytes + kept,
        states=states,
        activations=activations,
        logits=logits,
        free=free,
        arms=fitting,
        passes=len(split),
        tokens=max(map(_tokens, split)),
    )
    if not direct:
        logger.warning(
            "the base changes logits after its head, so those of all %d tokens of a pass are computed: %s",
            estimate.tokens,
            _size(logits),
        )
    if lean is False and shape.gated:
        logger.warning("the base's feed-forwards keep one more tensor a layer: the lean way gives something else")
    if states + activations + logits > free:
        logger.warning("not even one arm fits by estimate: %s", estimate.text())
    return PackPlan(fits=tuple(tasks[:fitting]), left=tuple(tasks[fitting:]), passes=passes, estimate=estimate)


def typical_pass_tokens(tasks: Sequence[ArmTask], max_tokens: int | None) -> int:
    """Tokens of the largest pass in a typical micro-step, with padding; limited memory may make it smaller.

    Depends on the arms and their data only. Uses the median of the longest of n drawn rows, which is the quantile
    0.5^(1/n) of all lengths, so that a single long row does not decide.
    """
    sizes = [_typical_rows_and_length(task) for task in tasks]
    groups = Passes(max_tokens=max_tokens).split(sizes, lambda size: size)
    return max(sum(rows for rows, _ in group) * max(length for _, length in group) for group in groups)


def free_pack_memory(base: LoadedBase, dequantized: int) -> int:
    """Bytes available to a pack, besides the loaded base and `dequantized` bytes of dequantized weights."""
    if base.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.device)
        unused = torch.cuda.memory_reserved(base.device) - torch.cuda.memory_allocated(base.device)
        return int(CUDA_SHARE * (free + unused))
    return int(CPU_SHARE * (free_memory() - (0 if is_dequantized(base.model) else dequantized)))


def process_bytes(base: LoadedBase, dequantized: int, temporary: int) -> int:
    """What this process takes besides the base, the arms and the tensors of a pass; 0 on a GPU.

    That is what is resident now without the base (Python, libraries, rows), `GROWTH_BYTES`, and the blocks that the C
    library cannot reuse: `ALLOCATOR_SHARE` of the `temporary` bytes of a pass.
    """
    if base.device.type != "cpu":
        return 0
    # What glibc keeps after the last pack would count twice: the next pass reuses it.
    release_freed_memory()
    held = base.memory_bytes - _unread_bytes() + (dequantized if is_dequantized(base.model) else 0)
    resident = psutil.Process().memory_info().rss
    return max(0, resident - held) + GROWTH_BYTES + int(ALLOCATOR_SHARE * temporary)


def _unread_bytes() -> int:
    """Bytes of mapped weights that are not in memory yet: the first pass reads them."""
    try:
        lines = _SMAPS.read_text().splitlines()
    except OSError:  # Not Linux.
        return 0
    unread, mapped = 0, False
    for line in lines:
        fields = line.split()
        if not fields[0].endswith(":"):
            mapped = fields[-1].endswith(".safetensors")
        elif mapped and fields[0] == "Size:":
            unread += int(fields[1]) << 10
        elif mapped and fields[0] == "Rss:":
            unread -= int(fields[1]) << 10
    return unread


def default_token_budget(base: LoadedBase) -> int:
    """Default tokens of a forward pass."""
    return CPU_TOKENS if base.device.type == "cpu" else CUDA_TOKENS


def _stored_ranks(tasks: Sequence[ArmTask], linear: dict[str, tuple[int, int]], *, cpu: bool) -> list[int]:
    """The ranks to which arms are padded: see `modeling.lora.stacks`."""
    largest: dict[object, int] = {}
    keys: list[object] = []
    for task in tasks:
        rank, exact = task.spec.lora.r, cpu or task.spec.training.optim in IN_8_BIT
        targets = tuple(match_targets(linear, task.spec.lora.target_modules))
        keys.append((targets, exact, rank if exact else rank_class(rank)))
        largest[keys[-1]] = max(rank, largest.get(keys[-1], 0))
    return [largest[key] for key in keys]


def _share(task: ArmTask, linear: dict[str, tuple[int, int]], rank: int, copies: int) -> _ArmMemory:
    """What an arm stored with a rank takes; `copies` are the bytes of a number's copy for products."""
    spec = task.spec
    targets = match_targets(linear, spec.lora.target_modules)
    rows, length = _rows_and_length(task)
    numbers = rank * sum(side for shape in targets.values() for side in shape)
    return _ArmMemory(
        rows=rows,
        length=length,
        positions=rows * max(int(row.supervised.sum()) for row in task.train),
        adapter=AdapterShape(
            inputs={name: inputs for name, (inputs, _) in targets.items()},
            r=spec.lora.r,
            dropout=spec.lora.lora_dropout > 0,
        ),
        states=state_bytes(numbers, spec.training) + copies * numbers,
    )


def _rows_and_length(task: ArmTask) -> tuple[int, int]:
    """Rows of a micro-batch, and tokens of the longest row of the data."""
    rows = min(task.spec.training.per_device_train_batch_size, len(task.train))
    return rows, max(len(row.input_ids) for row in task.train)


def _typical_rows_and_length(task: ArmTask) -> tuple[int, int]:
    """Rows of a micro-batch, and the median of its longest row's tokens."""
    rows, _ = _rows_and_length(task)
    lengths = sorted(len(row.input_ids) for row in task.train)
    return rows, lengths[math.ceil(len(lengths) * 0.5 ** (1 / rows)) - 1]


def _split(passes: Passes, shares: Sequence[_ArmMemory]) -> Iterator[list[_ArmMemory]]:
    return passes.split(shares, lambda arm: (arm.rows, arm.length))


def _tokens(group: Sequence[_ArmMemory]) -> int:
    return sum(arm.rows for arm in group) * max(arm.length for arm in group)


def _size(count: int) -> str:
    return format_size(count, unit="GiB") if count >= 1 << 30 else format_size(count, ".0f", unit="MiB")
