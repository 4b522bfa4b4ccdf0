"""One optimizer step of every living arm of a pack.

The arms' micro-batches of one rank (the first of each arm, the second, ...) go through the base together, rows sorted
by arm; an arm with fewer micro-batches sits out. The loss of an arm is the sum over its supervised tokens divided by
their number in its whole accumulation, as transformers does with `num_items_in_batch`; the losses of all arms are added
and backpropagated once. Each arm's matrices get the gradient that they get alone, since no row of another arm reads
them.

A step is a pure function of the arms' states until the optimizers run. So when memory runs out, gradients are dropped
and the step is made again with the pack in more parts. What the optimizers need is there before (`LivingArm`), so that
their steps ask for no memory; should one of them fail nevertheless, the pack does, and goes on from its checkpoint.

Measured on one core (AVX2, CPU seconds of a step, SmolLM2-135M in NF4, r 8 on q, k, v, o, dropout 0.05, rows of 45
tokens, the machine otherwise in use, so take ratios):

| step | plain peft loop | packs of one, 4-bit weights | packs of one, weights kept | 8 arms, weights kept |
|---|---|---|---|---|
| 8 rows an arm | 5.1 | 3.5 | 3.2 | |
| 1 row an arm | 1.1 to 1.5 | 1.0 | 0.62 | 0.51 an arm |

Of the 3.2 seconds 72 % are the base's matrix products, at 60 to 100 % of what MKL reaches on these shapes alone; the
adapters take 15 %, dropout a third of that. oneDNN's packed weights are not in this build of torch.

- The largest memory seen, the end of it, and giving it back.
- In how many forward passes the arms of a micro-step go through the base.
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
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch.nn import functional

from rankwise.data.batches import collate
from rankwise.data.tokens import Encoded
from rankwise.exceptions import JobError, is_out_of_memory
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import Routing, Segment
from rankwise.training.arm import LivingArm, StepRecord


def give_back() -> None:
    """Let the system have what this process has freed on a CPU: glibc keeps it otherwise (750 MiB after a pack)."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


class PeakMemory:
    """Largest memory of this process since the start of the watch.

    On CUDA the allocator knows its peak. On a CPU the kernel's own high-water mark covers the whole life of the
    process, which trains one arm after another; so the resident set is read after each forward and backward pass, where
    it is largest.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin to watch."""
        self._device = device
        self._process = psutil.Process()
        self._peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.sample()

    def sample(self) -> None:
        """Look at the memory of now."""
        if self._device.type != "cuda":
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def bytes(self) -> int:
        """The largest so far."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else self._peak


T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How arms are split. It decides last bits of the results, so it is kept with the checkpoints.

    Attributes:
        parts: The arms are cut into so many runs of one length (or fewer, where arms are few).
        max_tokens: Each run is cut again where its rows times its longest row exceed this; None for no limit. A single
            arm is never cut.
    """

    parts: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse what leaves no pass."""
        if self.parts < 1:
            raise ValueError(f"parts must be at least 1, got {self.parts}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {self.max_tokens}")

    def split(self, items: Sequence[T], size: Callable[[T], tuple[int, int]]) -> Iterator[list[T]]:
        """Cut arms into passes, in their order.

        Args:
            items: The arms, or what stands for them.
            size: Rows of an arm in this micro-step, and tokens of the longest of them.
        """
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
        """Twice as many parts, but no more than there are arms."""
        return replace(self, parts=min(2 * self.parts, arms))


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Nonfinite:
    """Why an arm's step was not made.

    Attributes:
        what: `loss`, `gradient` or `weights`.
        step: The step that failed, counted from 1.
        number: The loss or the norm.
        example_ids: Rows with a non-finite loss, or all rows of the step where only the gradient is not finite.
    """

    what: Literal["loss", "gradient", "weights"]
    step: int
    number: float
    example_ids: tuple[str, ...]


@dataclass(kw_only=True, eq=False)
class _Work:
    """What one arm has in a step."""

    arm: LivingArm
    window: list[list[Encoded]]
    supervised: int
    losses: list[tuple[list[Encoded], torch.Tensor, torch.Tensor]]
    """For each micro-batch its rows, the row of each supervised token, and their losses."""

    def size(self, micro_step: int) -> tuple[int, int]:
        """Rows of a micro-batch, and tokens of the longest."""
        rows = self.window[micro_step]
        return len(rows), max(len(row.input_ids) for row in rows)

    @property
    def padded(self) -> int:
        """Tokens of all micro-batches, with the padding of the arm's own rows."""
        return sum(math.prod(self.size(micro_step)) for micro_step in range(len(self.window)))


class Stepper:
    """Makes steps over one base.

    Attributes:
        passes: How the arms of a micro-step are split; finer when memory has run out.
    """

    def __init__(
        self, model: Any, routing: Routing, pad_token_id: int, memory: PeakMemory, passes: Passes | None = None
    ) -> None:
        """Check how the model computes logits."""
        self._model = model
        self._routing = routing
        self.logits = SupervisedLogits(model)
        self._pad_token_id = pad_token_id
        self._device = next(model.parameters()).device
        self._memory = memory
        self.passes = passes or Passes()

    def step(self, arms: Sequence[LivingArm]) -> dict[str, StepRecord | Nonfinite]:
        """Make one optimizer step of each arm.

        Returns:
            For each spec hash the record of its step; or why it was not made, in which case the arm is as before.

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
                    arm.forget_gradient()
                if self.passes.parts >= len(arms):
                    raise JobError(
                        f"out of memory with one arm at a time on {self._device}: lower "
                        "training.per_device_train_batch_size (and raise gradient_accumulation_steps) or "
                        f"training.max_length, or set training.gradient_checkpointing: {error}"
                    ) from error
            # Outside of the handler: the traceback holds on to the tensors of the failed pass.
            gc.collect()
            torch.cuda.empty_cache()
            self.passes = self.passes.finer(len(arms))
            logger.warning(
                "out of memory: %d arms go through the base in %d parts from now on", len(arms), self.passes.parts
            )
        return self._update(works, began)

    def _gradients(self, arms: Sequence[LivingArm]) -> list[_Work]:
        """Forward and backward passes over all micro-batches of a step; nothing of an arm changes but its gradients."""
        works = []
        for arm in arms:
            window = arm.window()
            supervised = sum(int(row.supervised.sum()) for rows in window for row in rows)
            works.append(_Work(arm=arm, window=window, supervised=supervised, losses=[]))
        for micro_step in range(max(len(work.window) for work in works)):
            present = [work for work in works if micro_step < len(work.window)]
            for part in self.passes.split(present, partial(_Work.size, micro_step=micro_step)):
                self._pass(part, micro_step)
        return works

    def _update(self, works: Sequence[_Work], began: float) -> dict[str, StepRecord | Nonfinite]:
        """Clip, and make the optimizers' steps; the passes began at `began`."""
        losses = [
            torch.stack([part.sum() for _, _, part in work.losses]).sum() / max(1, work.supervised) for work in works
        ]
        norms = [work.arm.grad_norm() for work in works]
        # A GPU is waited for here: no clock between the passes says what a single one takes there.
        numbers = torch.stack([torch.stack(losses), torch.stack(norms)]).tolist()
        passes = time.perf_counter() - began
        padded = sum(work.padded for work in works)
        began = time.perf_counter()
        results: dict[str, StepRecord | Nonfinite] = {}
        for work, loss, grad_norm, norm in zip(works, numbers[0], numbers[1], norms, strict=True):
            arm = work.arm
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                arm.forget_gradient()
                results[arm.spec_hash] = _nonfinite(work, loss, grad_norm)
                continue
            learning_rate = arm.learning_rate
            arm.update(norm)
            tokens = sum(len(row.input_ids) for rows in work.window for row in rows)
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

    def _pass(self, works: Sequence[_Work], micro_step: int) -> None:
        """One forward and backward pass over a micro-batch of each of these arms."""
        rows: list[Encoded] = []
        segments: list[Segment] = []
        for work in works:
            own = work.window[micro_step]
            segments.append(
                Segment(
                    adapter=work.arm.name,
                    start=len(rows),
                    stop=len(rows) + len(own),
                    dropout=work.arm.dropout(micro_step),
                    length=max(len(row.input_ids) for row in own),
                )
            )
            rows += own
        batch = collate(rows, self._pad_token_id)
        assert not batch.supervised[:, 0].any(), "nothing predicts the first token of a row"
        row_of, token = batch.supervised.nonzero(as_tuple=True)
        targets = batch.input_ids[row_of, token]
        counts = [int(batch.supervised[each.start : each.stop].sum()) for each in segments]
        with self._routing.segments(segments):
            # Not kept under a name: the backward pass needs their log-softmax, and not themselves.
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
                [part.sum() / max(1, work.supervised) for work, part in zip(works, parts, strict=True)]
            ).sum()
            self._memory.sample()
            total.backward()  # type: ignore[no-untyped-call]
        self._memory.sample()
        places = torch.split(row_of, counts)
        for work, segment, part, place in zip(works, segments, parts, places, strict=True):
            work.losses.append((work.window[micro_step], place - segment.start, part.detach()))


def _nonfinite(work: _Work, loss: float, grad_norm: float) -> Nonfinite:
    bad: list[str] = []
    for rows, place, losses in work.losses:
        bad += [rows[index].id for index in sorted(set(place[~torch.isfinite(losses).cpu()].tolist()))]
    everything = [row.id for rows in work.window for row in rows]
    return Nonfinite(
        what="gradient" if math.isfinite(loss) else "loss",
        step=work.arm.step + 1,
        number=grad_norm if math.isfinite(loss) else loss,
        example_ids=tuple(dict.fromkeys(bad or everything)),
    )
