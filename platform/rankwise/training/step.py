"""One optimizer step of every arm of a pack: split into forward passes, gradients, updates, peak memory.

1. Micro-step i takes the i-th micro-batch of every arm that has one. Its rows share sequences where that is cheaper
   than padding (`training.streams`). `Passes` splits the arms of a micro-step into forward passes through the base.
   Rows of an architecture in which they depend on their neighbours (`row_check`) are padded and go through passes of
   one arm and one length.
2. All that the passes of the step need goes to the device in one copy, for which the CPU does not wait.
3. An arm's loss is the sum over its supervised tokens, divided by their number in its whole accumulation (as
   transformers does with `num_items_in_batch`). The losses of a pass are added and backpropagated once. No row of
   another arm uses an arm's matrices, so each arm gets the gradient that it gets alone.
4. Gradients are clipped and all arms updated. Losses and norms come back once, after that: nothing else in a step makes
   the CPU wait for a GPU.

Until 4, a step is a pure function of the arms' states: when memory runs out, gradients are dropped and the step is
repeated with the pack split more finely. Optimizer states are allocated in advance, so 4 needs no memory; if it fails
anyway, the pack fails and resumes from its checkpoint.
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

from rankwise.data.tokens import Encoded
from rankwise.exceptions import JobError, is_out_of_memory
from rankwise.modeling.lora.draws import DropoutKey, token_words
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import Routing, Segment
from rankwise.modeling.rope import row_lengths
from rankwise.training.arm import StepRecord, TrainingArm
from rankwise.training.optimizer import PackOptimizer, to_device
from rankwise.training.row_check import rows_are_independent
from rankwise.training.streams import StreamCost, Streams, attends_by_rows, choose, lay_out, single, spread


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
    streams: list[Streams]
    """Of each micro-batch."""
    losses: list[tuple[list[Encoded], torch.Tensor, torch.Tensor]]
    """For each micro-batch its rows, the row of each supervised token, and their losses."""

    def lengths(self, micro_step: int) -> list[int]:
        return [len(row.input_ids) for row in self.micro_batches[micro_step]]

    def size(self, micro_step: int) -> tuple[int, int]:
        return len(self.streams[micro_step].rows), self.streams[micro_step].length

    @property
    def padded(self) -> int:
        """Tokens of all micro-batches, with the padding of the arm's own streams."""
        return sum(math.prod(self.size(micro_step)) for micro_step in range(len(self.micro_batches)))


_PARTS = 1 << 20
"""Offset of the micro-step in the dropout keys of an arm's parts: their masks must differ."""


@dataclass(frozen=True, eq=False)
class _Share:
    """Rows of one arm in one pass, and their streams."""

    work: _ArmStep
    rows: list[Encoded]
    streams: Streams
    dropout: DropoutKey | None


@dataclass(kw_only=True, eq=False)
class _Pass:
    """One forward and backward pass.

    Attributes:
        shares: Its arms and their rows.
        segments: Their streams.
        counts: Supervised tokens of each arm.
        places: The row of each supervised token in its share, on the CPU.
        spans: The lengths of the rows in each stream, where attention runs by rows.
        inputs: Tensors of int64, on the device from `_send` on: those of `StreamBatch` that are needed, and `owners`,
            the index of each supervised token's arm among those of the step.
    """

    shares: list[_Share]
    segments: list[Segment]
    counts: list[int]
    places: torch.Tensor
    spans: list[list[int]] | None
    inputs: dict[str, torch.Tensor]


class Stepper:
    """Makes optimizer steps over one base. Its `passes` get finer when memory runs out."""

    def __init__(
        self,
        model: Any,
        routing: Routing,
        optimizer: PackOptimizer,
        logits: SupervisedLogits,
        pad_token_id: int,
        memory: PeakMemory,
        passes: Passes | None = None,
    ) -> None:
        self._model = model
        self._routing = routing
        self._optimizer = optimizer
        self.logits = logits
        dtype = model.get_input_embeddings().weight.dtype
        self._device = next(model.parameters()).device
        self._independent = rows_are_independent(model, self.logits)
        packs = self.logits.packs and self._independent
        self._cost = StreamCost.of(model, self._device, dtype) if packs else None
        self._by_rows = attends_by_rows(model, self._device)
        self._pad_token_id = pad_token_id
        self._memory = memory
        self.passes = passes or Passes()

    def step(self, arms: Sequence[TrainingArm]) -> dict[str, StepRecord | NonFiniteStep]:
        """Make one optimizer step of all arms of the optimizer; by spec hash.

        An arm with a `NonFiniteStep` has made no step and its optimizer's state is void: it has to leave.

        Raises:
            JobError: Out of memory with a single arm.
        """
        order = {adapter: index for index, adapter in enumerate(self._optimizer.stacks.adapters)}
        arms = sorted(arms, key=lambda arm: order[arm.name])
        assert len(arms) == len(order), "an optimizer's arms step together"
        while True:
            began = time.perf_counter()
            try:
                works, losses = self._gradients(arms)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._optimizer.clear_gradients()
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
        return self._update(works, losses, began)

    def _gradients(self, arms: Sequence[TrainingArm]) -> tuple[list[_ArmStep], torch.Tensor]:
        """The arms' gradients in their stacks, and losses, on the device."""
        works = []
        for arm in arms:
            micro_batches = arm.micro_batches()
            supervised = sum(int(row.supervised.sum()) for rows in micro_batches for row in rows)
            works.append(_ArmStep(arm=arm, micro_batches=micro_batches, supervised=supervised, streams=[], losses=[]))
        index = {work.arm.name: number for number, work in enumerate(works)}
        passes = []
        for micro_step in range(max(len(work.micro_batches) for work in works)):
            present = [work for work in works if micro_step < len(work.micro_batches)]
            self._choose_streams(present, micro_step)
            for part in self.passes.split(present, partial(_ArmStep.size, micro_step=micro_step)):
                for shares in self._shares(part, micro_step):
                    passes.append(self._prepare(shares, [index[share.work.arm.name] for share in shares]))
        weights = torch.tensor([1.0 / max(1, work.supervised) for work in works], dtype=torch.float64)
        weights = self._send(passes, weights)
        losses = torch.zeros_like(weights)
        for each in passes:
            losses += self._pass(each, weights)
        return works, losses

    def _choose_streams(self, works: Sequence[_ArmStep], micro_step: int) -> None:
        """Decide which rows share sequences: for all arms together on a GPU, where equal shapes share products."""
        lengths = [work.lengths(micro_step) for work in works]
        if self._cost is None:
            streams = list(map(single, lengths))
        elif self._by_rows:
            streams = [spread(own, 1) for own in lengths]
        elif self._device.type == "cpu":
            streams = [choose([own], self._cost)[0] for own in lengths]
        else:
            streams = choose(lengths, self._cost)
        for work, own in zip(works, streams, strict=True):
            work.streams.append(own)

    def _shares(self, works: Sequence[_ArmStep], micro_step: int) -> Iterator[list[_Share]]:
        """The arms' rows in a pass; one pass for each arm and length if rows depend on their neighbours."""
        if self._independent:
            yield [
                _Share(work, work.micro_batches[micro_step], work.streams[micro_step], work.arm.dropout(micro_step))
                for work in works
            ]
            return
        for work in works:
            by_length: dict[int, list[Encoded]] = {}
            for row in work.micro_batches[micro_step]:
                by_length.setdefault(len(row.input_ids), []).append(row)
            key = work.arm.dropout(micro_step)
            for part, (length, rows) in enumerate(by_length.items()):
                own = None if key is None else replace(key, micro_step=key.micro_step + _PARTS * part)
                yield [_Share(work, rows, single([length] * len(rows)), own)]

    def _prepare(self, shares: list[_Share], numbers: Sequence[int]) -> _Pass:
        segments: list[Segment] = []
        words = []
        start = 0
        for share in shares:
            stop, key = start + len(share.streams.rows), share.dropout
            segments.append(
                Segment(adapter=share.work.arm.name, start=start, stop=stop, dropout=key, length=share.streams.length)
            )
            longest = max(len(row.input_ids) for row in share.rows)
            words.append(None if key is None else token_words(key, len(share.rows), longest))
            start = stop
        batch = lay_out([(share.rows, share.streams) for share in shares], words, self._pad_token_id)
        owners = torch.tensor(numbers).repeat_interleave(torch.tensor(batch.counts))
        names = ["input_ids", "rows", "positions", "targets"]
        names += ["attention_mask"] if self.logits.masked else []
        names += ["position_ids"] if batch.shared else []
        names += ["sequences"] if batch.shared and not self._by_rows else []
        names += ["words"] if any(each is not None for each in words) else []
        return _Pass(
            shares=shares,
            segments=segments,
            counts=batch.counts,
            places=batch.places,
            spans=batch.spans if batch.shared and self._by_rows else None,
            inputs={"owners": owners, **{name: getattr(batch, name) for name in names}},
        )

    def _send(self, passes: Sequence[_Pass], weights: torch.Tensor) -> torch.Tensor:
        """Copy what all passes of a step need to the device, in one go; returns the weights there."""
        if self._device.type == "cpu":
            return weights
        tensors = [weights.view(torch.int64)]
        tensors += [tensor for each in passes for tensor in each.inputs.values()]
        buffer = to_device(torch.cat([tensor.flatten() for tensor in tensors]), self._device)
        there, *rest = (
            part.view(tensor.shape)
            for part, tensor in zip(torch.split(buffer, [tensor.numel() for tensor in tensors]), tensors, strict=True)
        )
        arrived = iter(rest)
        for each in passes:
            each.inputs = {name: next(arrived) for name in each.inputs}
        return there.view(torch.float64)

    def _update(
        self, works: Sequence[_ArmStep], losses: torch.Tensor, began: float
    ) -> dict[str, StepRecord | NonFiniteStep]:
        norms = self._optimizer.norms()
        rates = {work.arm.name: work.arm.learning_rate for work in works}
        finite = torch.isfinite(losses) & torch.isfinite(norms)
        self._optimizer.update(norms, finite, rates, {work.arm.name: work.arm.step + 1 for work in works})
        # This waits for the GPU: the single times of passes and updates are unknown there.
        numbers = torch.stack([losses, norms.double()]).tolist()
        seconds = time.perf_counter() - began
        padded = sum(work.padded for work in works)
        results: dict[str, StepRecord | NonFiniteStep] = {}
        for work, loss, grad_norm in zip(works, *numbers, strict=True):
            arm = work.arm
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                if not math.isfinite(loss) and any(streams.shared for streams in work.streams):
                    self._separate_losses(work)
                results[arm.spec_hash] = _nonfinite(work, loss, grad_norm)
                continue
            tokens = sum(len(row.input_ids) for rows in work.micro_batches for row in rows)
            own = seconds * work.padded / padded
            arm.step += 1
            arm.seconds += own
            arm.tokens += tokens
            arm.metrics["train.loss"] = loss
            arm.metrics["train.tokens_per_second"] = arm.tokens / arm.seconds
            results[arm.spec_hash] = StepRecord(
                step=arm.step,
                loss=loss,
                learning_rate=rates[arm.name],
                grad_norm=grad_norm,
                tokens=tokens,
                supervised_tokens=work.supervised,
                seconds=own,
            )
        return results

    def _pass(self, each: _Pass, weights: torch.Tensor) -> torch.Tensor:
        """Make one pass: gradients go to the stacks; returns what it adds to the losses of the step's arms."""
        inputs = each.inputs
        # Those of streams with several rows, which no rotary embedding that needs lengths gets.
        lengths = [
            sum(len(share.rows[index].input_ids) for index in stream)
            for share in each.shares
            for stream in share.streams.rows
        ]
        segments = self._routing.segments(each.segments, inputs.get("words"), each.spans)
        with segments, row_lengths(self._model, lengths):
            losses = self.logits.losses(
                inputs["input_ids"],
                inputs.get("attention_mask"),
                inputs["rows"],
                inputs["positions"],
                inputs["targets"],
                inputs.get("position_ids"),
                inputs.get("sequences"),
            )
            weighted = losses * weights[inputs["owners"]]
            self._memory.sample()
            weighted.sum().backward()  # type: ignore[no-untyped-call]
        self._memory.sample()
        parts = torch.split(losses.detach(), each.counts)
        places = torch.split(each.places, each.counts)
        for share, part, place in zip(each.shares, parts, places, strict=True):
            share.work.losses.append((share.rows, place, part))
        return torch.zeros_like(weights).index_add_(0, inputs["owners"], weighted.detach())

    @torch.no_grad()
    def _separate_losses(self, work: _ArmStep) -> None:
        """Find an arm's losses again, row by row: in a shared sequence one row's NaN reaches the others."""
        work.losses = []
        for rows in work.micro_batches:
            for row in rows:
                batch = lay_out([([row], single([len(row.input_ids)]))], [None], self._pad_token_id)
                names = ("input_ids", "attention_mask", "rows", "positions", "targets")
                with self._routing.segments([Segment(adapter=work.arm.name, start=0, stop=1)]):
                    losses = self.logits.losses(*(getattr(batch, name).to(self._device) for name in names))
                work.losses.append(([row], batch.places, losses))


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
