"""One optimizer step of every arm of a pack: split into forward passes, gradients, updates, peak memory.

1. Micro-step i takes the i-th micro-batch of every arm that has one; rows are sorted by arm.
2. `Passes` splits the arms of a micro-step into forward passes through the base. Rows of an architecture in which
   they depend on their neighbours (`row_check`) go through passes of one arm and one length.
3. An arm's loss is the sum over its supervised tokens, divided by their number in its whole accumulation (as
   transformers does with `num_items_in_batch`). The losses of a pass are added and backpropagated once. No row of
   another arm uses an arm's matrices, so each arm gets the gradient that it gets alone.
4. Gradients are clipped and the optimizers step, per arm.

Until 4, a step is a pure function of the arms' states: when memory runs out, gradients are dropped and the step is
repeated with the pack split more finely. Optimizer states are allocated in advance, so 4 needs no memory;
if it fails anyway, the pack fails and resumes from its checkpoint.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch.nn import functional

from rankwise.data.batches import collate
from rankwise.data.tokens import Encoded
from rankwise.exceptions import JobError, is_out_of_memory
from rankwise.modeling.lora.function import DropoutKey
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import Routing, Segment
from rankwise.modeling.rope import row_lengths
from rankwise.training.arm import StepRecord, TrainingArm
from rankwise.training.row_check import rows_are_independent


def release_freed_memory() -> None:
    """Return freed CPU memory to the system, which glibc would keep (750 MiB after a pack)."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)


class PeakMemory:
    """Peak memory of this process since the object was created: by CUDA's allocator, or resident memory by the kernel.

    Where the kernel's peak cannot be reset (not Linux, or a container without the permission), resident memory is
    sampled.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._exact = device.type != "cuda" and _reset_peak()
        self.sample()

    def sample(self) -> None:
        """Sample the current memory."""
        if self._device.type != "cuda":
            self._peak = max(self._peak, _peak_resident() if self._exact else self._process.memory_info().rss)

    @property
    def bytes(self) -> int:
        """The peak so far."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else self._peak


def _reset_peak() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_resident() -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How the arms of a micro-step are split into forward passes; it affects the last bits of results.

    Arms are split into `parts`, and a part where its rows times its longest row exceed `max_tokens`.
    """

    parts: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise ValueError(f"parts must be at least 1, got {self.parts}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {self.max_tokens}")

    def split(self, items: Sequence[T], size: Callable[[T], tuple[int, int]]) -> Iterator[list[T]]:
        """Split arms into passes, in their order; `size` returns an arm's rows, and tokens of the longest one."""
        run = math.ceil(len(items) / self.parts)
        for start in range(0, len(items), run):
            group: list[T] = []
            rows = longest = 0
            for item in items[start : start + run]:
                count, length = size(item)
                rows, longest = rows + count, max(longest, length)
                if group and self.max_tokens is not None and rows * longest > self.max_tokens:
                    yield group
                    group, rows, longest = [], count, length
                group.append(item)
            yield group

    def finer(self, arms: int) -> Passes:
        """The same with twice as many parts, at most one for each arm."""
        return replace(self, parts=min(2 * self.parts, arms))


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NonFiniteStep:
    """A failed step of an arm, counted from 1, with its rows (all rows if only the gradient is not finite)."""

    quantity: Literal["loss", "gradient", "weights"]
    step: int
    number: float
    example_ids: tuple[str, ...]


@dataclass(kw_only=True, eq=False)
class _ArmStep:
    """The micro-batches and losses of one arm in a step."""

    arm: TrainingArm
    micro_batches: list[list[Encoded]]
    supervised: int
    losses: list[tuple[list[Encoded], torch.Tensor, torch.Tensor]]
    """For each micro-batch its rows, the row of each supervised token, and their losses."""

    def size(self, micro_step: int) -> tuple[int, int]:
        rows = self.micro_batches[micro_step]
        return len(rows), max(len(row.input_ids) for row in rows)

    @property
    def padded(self) -> int:
        """Tokens of all micro-batches, with the padding of the arm's own rows."""
        return sum(math.prod(self.size(micro_step)) for micro_step in range(len(self.micro_batches)))


_PARTS = 1 << 20
"""Offset of the micro-step in the dropout keys of an arm's parts: their masks must differ."""


@dataclass(frozen=True, eq=False)
class _Share:
    """Rows of one arm in one pass."""

    work: _ArmStep
    rows: list[Encoded]
    dropout: DropoutKey | None


class Stepper:
    """Makes optimizer steps over one base. Its `passes` get finer when memory runs out."""

    def __init__(
        self, model: Any, routing: Routing, pad_token_id: int, memory: PeakMemory, passes: Passes | None = None
    ) -> None:
        self._model = model
        self._routing = routing
        self.logits = SupervisedLogits(model)
        self._pad_token_id = pad_token_id
        self._device = next(model.parameters()).device
        self._memory = memory
        self._independent = rows_are_independent(model, self.logits)
        self.passes = passes or Passes()

    def step(self, arms: Sequence[TrainingArm]) -> dict[str, StepRecord | NonFiniteStep]:
        """Make one optimizer step of each arm; by spec hash. A `NonFiniteStep` leaves its arm unchanged.

        Raises:
            JobError: Out of memory with a single arm.
        """
        while True:
            began = time.perf_counter()
            try:
                works = self._gradients(arms)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                for arm in arms:
                    arm.clear_gradients()
                if self.passes.parts >= len(arms):
                    raise JobError(
                        f"out of memory with one arm at a time on {self._device}: lower "
                        "training.per_device_train_batch_size (and raise gradient_accumulation_steps) or "
                        f"training.max_length, or set training.gradient_checkpointing: {error}"
                    ) from error
            # Outside the handler, whose traceback keeps the tensors of the failed pass alive.
            gc.collect()
            torch.cuda.empty_cache()
            self.passes = self.passes.finer(len(arms))
            logger.warning("out of memory: %d arms are trained in %d parts from now on", len(arms), self.passes.parts)
        return self._update(works, began)

    def _gradients(self, arms: Sequence[TrainingArm]) -> list[_ArmStep]:
        works = []
        for arm in arms:
            micro_batches = arm.micro_batches()
            supervised = sum(int(row.supervised.sum()) for rows in micro_batches for row in rows)
            works.append(_ArmStep(arm=arm, micro_batches=micro_batches, supervised=supervised, losses=[]))
        for micro_step in range(max(len(work.micro_batches) for work in works)):
            present = [work for work in works if micro_step < len(work.micro_batches)]
            for part in self.passes.split(present, partial(_ArmStep.size, micro_step=micro_step)):
                self._pass(part, micro_step)
        return works

    def _update(self, works: Sequence[_ArmStep], began: float) -> dict[str, StepRecord | NonFiniteStep]:
        losses = [
            torch.stack([part.sum() for _, _, part in work.losses]).sum() / max(1, work.supervised) for work in works
        ]
        norms = [work.arm.grad_norm() for work in works]
        # This waits for the GPU, so passes are timed together: their single times are unknown there.
        numbers = torch.stack([torch.stack(losses), torch.stack(norms)]).tolist()
        passes = time.perf_counter() - began
        padded = sum(work.padded for work in works)
        began = time.perf_counter()
        results: dict[str, StepRecord | NonFiniteStep] = {}
        for work, loss, grad_norm, norm in zip(works, numbers[0], numbers[1], norms, strict=True):
            arm = work.arm
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                arm.clear_gradients()
                results[arm.spec_hash] = _nonfinite(work, loss, grad_norm)
                continue
            learning_rate = arm.learning_rate
            arm.update(norm)
            tokens = sum(len(row.input_ids) for rows in work.micro_batches for row in rows)
            seconds = passes * work.padded / padded + (time.perf_counter() - began)
            began = time.perf_counter()
            arm.seconds += seconds
            arm.tokens += tokens
            arm.metrics["train.loss"] = loss
            arm.metrics["train.tokens_per_second"] = arm.tokens / arm.seconds
            results[arm.spec_hash] = StepRecord(
                step=arm.step,
                loss=loss,
                learning_rate=learning_rate,
                grad_norm=grad_norm,
                tokens=tokens,
                supervised_tokens=work.supervised,
                seconds=seconds,
            )
        return results

    def _shares(self, works: Sequence[_ArmStep], micro_step: int) -> Iterator[list[_Share]]:
        """The arms' rows in a pass; one pass for each arm and length if rows depend on their neighbours."""
        if self._independent:
            yield [_Share(work, work.micro_batches[micro_step], work.arm.dropout(micro_step)) for work in works]
            return
        for work in works:
            by_length: dict[int, list[Encoded]] = {}
            for row in work.micro_batches[micro_step]:
                by_length.setdefault(len(row.input_ids), []).append(row)
            key = work.arm.dropout(micro_step)
            for part, rows in enumerate(by_length.values()):
                own = None if key is None else replace(key, micro_step=key.micro_step + _PARTS * part)
                yield [_Share(work, rows, own)]

    def _pass(self, works: Sequence[_ArmStep], micro_step: int) -> None:
        for shares in self._shares(works, micro_step):
            self._run(shares)

    def _run(self, shares: Sequence[_Share]) -> None:
        rows: list[Encoded] = []
        segments: list[Segment] = []
        for share in shares:
            segments.append(
                Segment(
                    adapter=share.work.arm.name,
                    start=len(rows),
                    stop=len(rows) + len(share.rows),
                    dropout=share.dropout,
                    length=max(len(row.input_ids) for row in share.rows),
                )
            )
            rows += share.rows
        batch = collate(rows, self._pad_token_id)
        assert not batch.supervised[:, 0].any(), "nothing predicts the first token of a row"
        row_of, token = batch.supervised.nonzero(as_tuple=True)
        targets = batch.input_ids[row_of, token]
        counts = [int(batch.supervised[segment.start : segment.stop].sum()) for segment in segments]
        lengths = [len(row.input_ids) for row in rows]
        with self._routing.segments(segments), row_lengths(self._model, lengths):
            # The logits get no name, so they are freed: the backward pass needs only their log-softmax.
            losses = functional.cross_entropy(
                self.logits(
                    batch.input_ids.to(self._device),
                    batch.attention_mask.to(self._device),
                    row_of.to(self._device),
                    (token - 1).to(self._device),
                ),
                targets.to(self._device),
                reduction="none",
            )
            parts = torch.split(losses, counts)
            total = torch.stack(
                [part.sum() / max(1, share.work.supervised) for share, part in zip(shares, parts, strict=True)]
            ).sum()
            self._memory.sample()
            total.backward()  # type: ignore[no-untyped-call]
        self._memory.sample()
        places = torch.split(row_of, counts)
        for share, segment, part, place in zip(shares, segments, parts, places, strict=True):
            share.work.losses.append((share.rows, place - segment.start, part.detach()))


def _nonfinite(work: _ArmStep, loss: float, grad_norm: float) -> NonFiniteStep:
    bad: list[str] = []
    for rows, place, losses in work.losses:
        bad += [rows[index].id for index in sorted(set(place[~torch.isfinite(losses).cpu()].tolist()))]
    everything = [row.id for rows in work.micro_batches for row in rows]
    return NonFiniteStep(
        quantity="gradient" if math.isfinite(loss) else "loss",
        step=work.arm.step + 1,
        number=grad_norm if math.isfinite(loss) else loss,
        example_ids=tuple(dict.fromkeys(bad or everything)),
    )
