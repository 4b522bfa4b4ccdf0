"""One optimizer for the arms of a pack: norms, clipping and AdamW over flat tensors, each arm with settings of its own.

Letters: `K` arms of a stack, `P` numbers of an arm.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    w = w (1 - lr decay) - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

AdamW is that of torch (Loshchilov and Hutter 2019). Rates, betas, decay and step counts of arms are columns of (K, 1),
so that one operation serves all arms of a stack: an update takes as many launches for sixteen arms as for one. On a
CPU, where launches cost nothing and memory is slow, torch's fused AdamW updates one row after the other: one pass over
memory instead of ten. It gets whole rows and never views of single matrices: see `lora.stacks`.

8-bit moments are those of bitsandbytes (Dettmers et al. 2022, block-wise dynamic quantization), by its function for one
tensor: one call an arm, since its settings are numbers and not tensors, and without the synchronization after each
tensor that bitsandbytes' own optimizer makes. On CPUs its loops are slow.

An arm whose loss or gradient is not finite keeps its weights, by a mask on the device, because the CPU does not know it
yet. Its moments are void: such an arm leaves the pack. Rows do not affect each other.

States are allocated with the optimizer, not in its first step, so running out of memory cannot interrupt an update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import bitsandbytes as bnb
import torch

from rankwise.compat.torch import fused_adamw
from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import TrainingSpec
from rankwise.modeling.lora.stacks import Layout, Stack, Stacks

_BLOCK = 256  # numbers that share a scale in 8-bit moments
IN_8_BIT = ("adamw_bnb_8bit", "paged_adamw_8bit")
_PAGED = 100_000  # numbers below which bitsandbytes does not page moments
_FP32 = ("exp_avg", "exp_avg_sq")


def state_bytes(numbers: int, training: TrainingSpec) -> int:
    """Bytes of an arm's numbers, padded, their gradients in fp32, and their optimizer."""
    if training.optim in IN_8_BIT:
        return 8 * numbers + 2 * numbers + 8 * -(-numbers // _BLOCK)
    return 16 * numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmTensors:
    """What is stored of an arm, on the CPU.

    Attributes:
        weights: The matrices under their names in a PEFT file; they may be views.
        moments: The optimizer's: by the matrices' names, or in 8 bit as they are stored; they may be views.
    """

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


class PackOptimizer:
    """AdamW for the arms of all stacks.

    Attributes:
        stacks: The arms' matrices and gradients.
    """

    def __init__(self, stacks: Stacks, training: Mapping[str, TrainingSpec]) -> None:
        """Allocate states.

        Args:
            stacks: The arms' matrices.
            training: The settings of each adapter.

        Raises:
            ConfigError: A paged optimizer on a CPU.
        """
        self.stacks = stacks
        self._training = dict(training)
        self._states: dict[Stack, _Moments | _Moments8Bit] = {}
        for stack in stacks:
            optims: set[str] = {self._training[member.adapter].optim for member in stack.members}
            self._states[stack] = _Moments8Bit(stack, optims) if optims & set(IN_8_BIT) else _Moments(stack)

    @torch.no_grad()
    def norms(self) -> torch.Tensor:
        """Norms of the arms' gradients before clipping, in the order of `Stacks.adapters`; once a step."""
        norms = []
        for stack in self.stacks:
            stack.finish_gradients()
            norms.append(torch.linalg.vector_norm(stack.gradients, dim=1))
        return torch.cat(norms)

    @torch.no_grad()
    def update(
        self, norms: torch.Tensor, finite: torch.Tensor, rates: Mapping[str, float], steps: Mapping[str, int]
    ) -> None:
        """Clip gradients, make a step of each arm, and set gradients to zero.

        Args:
            norms: From `norms`.
            finite: Whether each arm's loss and norm are finite, in the same order; others keep their weights.
            rates: The learning rate of each adapter.
            steps: The number of each adapter's step, counted from 1.
        """
        first = 0
        for stack in self.stacks:
            settings = [self._training[member.adapter] for member in stack.members]
            own = slice(first, first + len(stack))
            first = own.stop
            adapters = [member.adapter for member in stack.members]
            self._states[stack].update(
                norms[own],
                finite[own],
                settings,
                [rates[adapter] for adapter in adapters],
                [steps[adapter] for adapter in adapters],
            )
            stack.gradients.zero_()
            stack.changed()

    @torch.no_grad()
    def clear_gradients(self) -> None:
        """Set all gradients to zero."""
        for stack in self.stacks:
            stack.gradients.zero_()

    @torch.no_grad()
    def remove(self, adapter: str) -> None:
        """Take an arm out, and compact what is stored for its stack."""
        stack = self.stacks.of(adapter)
        left = [member.adapter for member in stack.members if member.adapter != adapter]
        if not left:
            self.stacks.drop(stack)
            del self._states[stack]
            return
        self._states[stack].keep(*stack.keep(left))

    @torch.no_grad()
    def is_finite(self, adapter: str) -> bool:
        """Whether all of an arm's matrices are finite."""
        stack = self.stacks.of(adapter)
        return bool(torch.isfinite(torch.linalg.vector_norm(stack.values[stack.index(adapter)])))

    @torch.no_grad()
    def snapshot(self) -> dict[str, ArmTensors]:
        """Copies of all arms' matrices and moments on the CPU, by adapter: one copy a tensor of the storage."""
        copies: dict[str, ArmTensors] = {}
        for stack in self.stacks:
            values, state = stack.values.to("cpu", copy=True), self._states[stack].snapshot()
            for member in stack.members:
                weights = dict(stack.matrices(values, member.adapter))
                copies[member.adapter] = ArmTensors(weights=weights, moments=state(member.adapter))
        return copies

    def load(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load moments of a snapshot, as they were stored."""
        self._states[self.stacks.of(adapter)].load(adapter, tensors)


def limit(training: TrainingSpec) -> float:
    """The largest norm that is not clipped."""
    return training.max_grad_norm if training.max_grad_norm > 0 else float("inf")


def _columns(settings: Sequence[TrainingSpec], rates: Sequence[float], steps: Sequence[int]) -> list[list[float]]:
    """What an update needs of each arm; the columns are unpacked in `_Moments._update_all`."""
    return [
        [
            limit(training),
            1.0 - rate * training.weight_decay,
            1.0 - training.adam_beta1,
            1.0 - training.adam_beta2,
            (1.0 - training.adam_beta2**step) ** -0.5,
            training.adam_epsilon,
            -rate / (1.0 - training.adam_beta1**step),
        ]
        for training, rate, step in zip(settings, rates, steps, strict=True)
    ]


def _clip(norms: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """What gradients are multiplied by, as `clip_grads_with_norm_` does."""
    return (limits / (norms + 1e-6)).clamp_(max=1.0)


class _Moments:
    """Moments in fp32, (K, P) each."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self.exp_avg = torch.zeros_like(stack.values)
        self.exp_avg_sq = torch.zeros_like(stack.values)

    def update(
        self,
        norms: torch.Tensor,
        finite: torch.Tensor,
        settings: Sequence[TrainingSpec],
        rates: Sequence[float],
        steps: Sequence[int],
    ) -> None:
        if self._stack.device.type == "cpu":
            self._update_rows(norms, finite, settings, rates, steps)
        else:
            self._update_all(norms, finite, settings, rates, steps)

    def _update_rows(
        self,
        norms: torch.Tensor,
        finite: torch.Tensor,
        settings: Sequence[TrainingSpec],
        rates: Sequence[float],
        steps: Sequence[int],
    ) -> None:
        values, gradients = self._stack.values, self._stack.gradients
        for row, (training, rate, step) in enumerate(zip(settings, rates, steps, strict=True)):
            if not finite[row]:
                continue
            if training.max_grad_norm > 0:
                gradients[row].mul_(_clip(norms[row], torch.tensor(training.max_grad_norm)))
            fused_adamw(
                values[row],
                gradients[row],
                (self.exp_avg[row], self.exp_avg_sq[row]),
                step,
                lr=rate,
                betas=(training.adam_beta1, training.adam_beta2),
                eps=training.adam_epsilon,
                weight_decay=training.weight_decay,
            )

    def _update_all(
        self,
        norms: torch.Tensor,
        finite: torch.Tensor,
        settings: Sequence[TrainingSpec],
        rates: Sequence[float],
        steps: Sequence[int],
    ) -> None:
        values, work = self._stack.values, self._stack.gradients
        columns = to_device(torch.tensor(_columns(settings, rates, steps)), values.device)
        limits, decay, one_minus_beta1, one_minus_beta2, correction, epsilon, rate = columns.unbind(1)
        work.mul_(_clip(norms, limits)[:, None])
        values.mul_(decay.masked_fill(~finite, 1.0)[:, None])
        self.exp_avg.lerp_(work, one_minus_beta1[:, None])
        self.exp_avg_sq.lerp_(work.square_(), one_minus_beta2[:, None])
        # The gradient's memory serves for the quotient, so that an update needs none.
        torch.sqrt(self.exp_avg_sq, out=work).mul_(correction[:, None]).add_(epsilon[:, None])
        torch.div(self.exp_avg, work, out=work).masked_fill_(~finite[:, None], 0.0)
        values.addcmul_(work, rate[:, None])

    def keep(self, before: Layout, rows: Sequence[int], after: Layout) -> None:
        self.exp_avg = before.convert(self.exp_avg, rows, after)
        self.exp_avg_sq = before.convert(self.exp_avg_sq, rows, after)

    def snapshot(self) -> Callable[[str], dict[str, torch.Tensor]]:
        copies = {key: getattr(self, key).to("cpu", copy=True) for key in _FP32}

        def moments(adapter: str) -> dict[str, torch.Tensor]:
            return {
                f"{name}.{key}": matrix
                for key, copy in copies.items()
                for name, matrix in self._stack.matrices(copy, adapter)
            }

        return moments

    @torch.no_grad()
    def load(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        for key in _FP32:
            for name, matrix in self._stack.matrices(getattr(self, key), adapter):
                matrix.copy_(tensors[f"{name}.{key}"])


class _Moments8Bit:
    """Moments in 8 bit, for each arm (P,) and scales of its blocks."""

    def __init__(self, stack: Stack, optims: set[str]) -> None:
        device = stack.device
        paged = "paged_adamw_8bit" in optims
        if paged and device.type != "cuda":
            raise ConfigError(
                "training.optim: paged_adamw_8bit needs a CUDA GPU, and this base is on "
                f"{device}; set it to adamw_bnb_8bit or adamw_torch_fused"
            )
        self._stack = stack
        arms, size = stack.values.shape
        self._states = [
            {
                "state1": _moments(size, device, paged=paged),
                "state2": _moments(size, device, paged=paged),
                "absmax1": torch.zeros(-(-size // _BLOCK), device=device),
                "absmax2": torch.zeros(-(-size // _BLOCK), device=device),
            }
            for _ in range(arms)
        ]
        # Tables of the 8-bit values, as bitsandbytes' optimizers make them.
        self._qmap1 = bnb.functional.create_dynamic_map(signed=True).to(device)
        self._qmap2 = bnb.functional.create_dynamic_map(signed=False).to(device)

    def update(
        self,
        norms: torch.Tensor,
        finite: torch.Tensor,
        settings: Sequence[TrainingSpec],
        rates: Sequence[float],
        steps: Sequence[int],
    ) -> None:
        values, gradients = self._stack.values, self._stack.gradients
        limits = to_device(torch.tensor([limit(training) for training in settings]), values.device)
        # bitsandbytes' kernel has no mask: such an arm still moves by its momentum, and stays finite.
        gradients.mul_(_clip(norms, limits)[:, None]).masked_fill_(~finite[:, None], 0.0)
        for row, (training, rate, step, state) in enumerate(zip(settings, rates, steps, self._states, strict=True)):
            bnb.functional.optimizer_update_8bit_blockwise(
                "adam",
                gradients[row],
                values[row],
                state["state1"],
                state["state2"],
                training.adam_beta1,
                training.adam_beta2,
                0.0,
                0.0,
                training.adam_epsilon,
                step,
                rate,
                self._qmap1,
                self._qmap2,
                state["absmax1"],
                state["absmax2"],
                training.weight_decay,
            )

    def keep(self, before: Layout, rows: Sequence[int], after: Layout) -> None:
        self._states = [self._states[row] for row in rows]

    def snapshot(self) -> Callable[[str], dict[str, torch.Tensor]]:
        copies = [{key: tensor.to("cpu", copy=True) for key, tensor in state.items()} for state in self._states]
        return lambda adapter: copies[self._stack.index(adapter)]

    @torch.no_grad()
    def load(self, adapter: str, tensors: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in self._states[self._stack.index(adapter)].items():
            tensor.copy_(tensors[key])


def _moments(size: int, device: torch.device, *, paged: bool) -> torch.Tensor:
    if paged and size >= _PAGED:
        made: torch.Tensor = bnb.functional.get_paged(size, dtype=torch.uint8, device=device)
        return made.zero_()
    return torch.zeros(size, dtype=torch.uint8, device=device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to a device without waiting for it."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
