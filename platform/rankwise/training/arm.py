"""An arm while it is in a pack: its adapter, optimizer, data order and counters.

The names are transformers'. The states are made with the optimizer, not with its first step: so an arm has all the
memory that it will ever have for itself before the first step, and running out of it cannot cut an update in half.

8-bit moments are bitsandbytes' (Dettmers et al. 2022, block-wise dynamic quantization in blocks of 256); matrices below
4,096 numbers keep theirs in fp32. bitsandbytes has kernels for them on GPUs, and on CPUs plain loops, which are slow.

- AdamW as an arm's optimizer: fused and in fp32, or with its moments in 8 bit.
- Learning rate schedules, by the formulas of `transformers.optimization`.
- What goes into a training and what comes out of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rankwise.compat.bitsandbytes import OPTIMIZER_TABLES, create_optimizer_state
from rankwise.compat.torch import create_adamw_state
from rankwise.data.batches import Sampler
from rankwise.data.tokens import Encoded
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.experiment.schema import TrainingSpec
from rankwise.modeling.adapter import PREFIX, read_adapter, scaling_of
from rankwise.modeling.lora.function import DropoutKey
from rankwise.modeling.lora.packed import adapter_parameters, create_adapter, delete_adapter

_BLOCK = 256
_SMALL = 4096
"""Matrices with fewer numbers have moments in fp32."""


def make_optimizer(parameters: Sequence[nn.Parameter], training: TrainingSpec) -> torch.optim.Optimizer:
    """An optimizer with its states.

    Raises:
        ConfigError: A paged optimizer on a device that has no paged memory.
    """
    options: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    if training.optim == "adamw_torch_fused":
        fused = torch.optim.AdamW(parameters, fused=True, **options)
        create_adamw_state(fused)
        return fused
    paged = training.optim == "paged_adamw_8bit"
    device = parameters[0].device.type
    if paged and device != "cuda":
        raise ConfigError(
            "training.optim: paged_adamw_8bit keeps moments in memory that a GPU shares with the CPU, and this base "
            f"is on {device}; set it to adamw_bnb_8bit or adamw_torch_fused"
        )
    in_8_bit: torch.optim.Optimizer = bnb.optim.AdamW(
        parameters, optim_bits=8, min_8bit_size=_SMALL, is_paged=paged, **options
    )
    create_optimizer_state(in_8_bit)
    return in_8_bit


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's state under the matrices' names."""
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if key not in OPTIMIZER_TABLES
    }


@torch.no_grad()
def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Copy a state back, as `state_tensors` gave it; one from before the first step may have been stored as nothing."""
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key, value in state.items():
            stored = tensors.get(f"{name}.{key}")
            if stored is None:
                assert key in OPTIMIZER_TABLES or not tensors, f"{key} of {name} is not in the stored state"
            elif isinstance(value, torch.Tensor):
                value.copy_(stored)
            else:
                state[key] = type(value)(stored.item())


def state_bytes(matrices: Sequence[int], training: TrainingSpec) -> int:
    """Bytes of an arm's matrices and gradients in fp32, and of its optimizer.

    Args:
        matrices: How many numbers each matrix has.
        training: Which optimizer.
    """
    if training.optim == "adamw_torch_fused":
        return 16 * sum(matrices)
    return sum(8 * size + (8 * size if size < _SMALL else 2 * size + 8 * -(-size // _BLOCK)) for size in matrices)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a pure function of the step, so that there is no state to save.

    Attributes:
        kind: Name as in TrainingArguments.
        peak: The learning rate after warm-up.
        warmup: Steps of linear warm-up.
        total: Optimizer steps of the whole training.
    """

    kind: Literal["constant", "constant_with_warmup", "linear", "cosine"]
    peak: float
    warmup: int
    total: int

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return self.peak * self._factor(step)

    def _factor(self, step: int) -> float:
        if self.kind == "constant":
            return 1.0
        if step < self.warmup:
            return step / max(1, self.warmup)
        if self.kind == "constant_with_warmup":
            return 1.0
        rest = max(1, self.total - self.warmup)
        if self.kind == "linear":
            return max(0.0, (self.total - step) / rest)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup) / rest)))


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmTask:
    """One arm to train.

    Attributes:
        spec: Its settings.
        train: Its training rows.
        evaluation: Rows for evaluation during training; needed where `training.eval_steps` is set.
        init_adapter: A PEFT directory to start from in place of fresh values. Its rank and its modules must be the
            arm's; its scaling need not be: B is scaled so that the arm begins as what the adapter computes.
        stop_at: After so many of its optimizer steps the arm is evaluated, saved aside and leaves the pack as `paused`;
            a later pack with a larger `stop_at` or None goes on from there. The learning rate's schedule is that of all
            steps. None, or all steps and more: it trains to its end.

    Raises:
        ValueError: `stop_at` is below 1.
    """

    spec: ArmSpec
    train: Sequence[Encoded]
    evaluation: Sequence[Encoded] | None = None
    init_adapter: Path | None = None
    stop_at: int | None = None

    def __post_init__(self) -> None:
        """Refuse a pause before the first step."""
        if self.stop_at is not None and self.stop_at < 1:
            raise ValueError(f"stop_at must be at least 1 or None, got {self.stop_at}")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step of one arm.

    Attributes:
        step: Optimizer step, counted from 1.
        loss: Mean negative log likelihood (nats) of the step's supervised tokens, before the update.
        learning_rate: The rate that the update used.
        grad_norm: Norm of the arm's gradient before clipping.
        tokens: Tokens of the step's rows, without padding.
        supervised_tokens: Those among them that the loss counts.
        seconds: The arm's share of the pack step's wall time, by its padded tokens; the shares of a pack add up.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ArmOutcome:
    """How an arm ended.

    Attributes:
        spec_hash: Which arm.
        status: `finished`: all steps done. `nonfinite`: a loss or gradient was not finite. `paused`: its `stop_at` was
            reached; `metrics` has the evaluation there. `stopped`: asked to stop. For both of the last a checkpoint is
            there to go on from.
        steps: Optimizer steps done.
        adapter: PEFT directory of the result: the last state of a finished arm, the last good checkpoint of one that
            became non-finite (None if there was none yet), None for a paused or stopped one.
        reason: Why it is not finished, in words; None for a finished arm.
        metrics: Last `train.loss`, `train.tokens_per_second`, and of the last evaluation `eval.loss` etc.
        seconds: Sum of the steps' shares of wall time, over all attempts that the checkpoints remember.
        peak_memory_bytes: Largest memory of the process seen while the arm was in the pack: allocated on the GPU, or
            resident on a CPU.
        best: PEFT directory of the best evaluated state by the primary metric; None without evaluations.
        best_step: The step of `best`.
        best_value: The primary metric of `best`.
        example_ids: Rows of the non-finite step, narrowed to those whose own loss is not finite where there are such.
    """

    spec_hash: str
    status: Literal["finished", "nonfinite", "paused", "stopped"]
    steps: int
    adapter: Path | None
    reason: str | None
    metrics: Mapping[str, float]
    seconds: float
    peak_memory_bytes: int
    best: Path | None = None
    best_step: int | None = None
    best_value: float | None = None
    example_ids: tuple[str, ...] = field(default=())


class PackObserver:
    """Told what happens in a pack; every method does nothing here. Called from the thread that trains.

    After a crash steps are repeated from the last checkpoint, so a step can be told twice: `on_start` says where an arm
    begins.
    """

    def on_start(self, spec_hash: str, step: int, total_steps: int) -> None:
        """An arm begins, with `step` of its `total_steps` steps done already."""

    def on_step(self, spec_hash: str, record: StepRecord) -> None:
        """An arm made an optimizer step."""

    def on_evaluation(self, spec_hash: str, step: int, metrics: Mapping[str, float]) -> None:
        """An arm was evaluated after `step` steps."""

    def on_checkpoint(self, step: int, directory: Path) -> None:
        """All living arms were saved after the pack's step `step`."""

    def on_end(self, outcome: ArmOutcome) -> None:
        """An arm left the pack."""


@dataclass(kw_only=True, eq=False)
class Best:
    """The best evaluated state so far: where its adapter is, after which step, and the primary metric there."""

    directory: Path
    step: int
    value: float


class LivingArm:
    """One arm in a pack. The model holds the matrices; everything else of the arm is here.

    Attributes:
        task: What is trained.
        name: The adapter's name.
        parameters: The matrices under the names of a PEFT file, kept from their creation: peft's own switches of
            `requires_grad` and of active adapters say nothing about who trains.
        step: Optimizer steps done.
        total_steps: Optimizer steps of the whole training.
        seconds: Share of wall time so far.
        tokens: Tokens trained on so far.
        metrics: The last numbers.
        evaluated: The step of the last evaluation; 0 before the first.
        best: The best evaluated state.
    """

    def __init__(self, task: ArmTask, model: Any) -> None:
        """Inject the arm's adapter with its start values.

        Raises:
            ConfigError: The adapter does not fit the base or `init_adapter`, or there is no such optimizer on the
            base's device.
        """
        training = task.spec.training
        self.task = task
        self.name = create_adapter(model, task.spec)
        self.parameters = adapter_parameters(model, self.name)
        try:
            if task.init_adapter is not None:
                initial = read_adapter(task.init_adapter)
                self.load(initial.tensors, str(task.init_adapter))
                self._take_over_scaling(initial.config)
            self.optimizer = make_optimizer(list(self.parameters.values()), training)
        except BaseException:
            delete_adapter(model, self.name)
            raise
        self.step = 0
        self.total_steps = training.optimizer_steps(len(task.train))
        self.seconds = 0.0
        self.tokens = 0
        self.metrics: dict[str, float] = {}
        self.evaluated = 0
        self.best: Best | None = None

    @property
    def spec_hash(self) -> str:
        """The arm's full name."""
        return self.task.spec.spec_hash

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.task.spec.training.gradient_accumulation_steps

    @property
    def done(self) -> bool:
        """Whether all optimizer steps are made."""
        return self.step >= self.total_steps

    @property
    def pauses(self) -> bool:
        """Whether the arm is to leave the pack here, unfinished."""
        return self.task.stop_at is not None and self.step >= self.task.stop_at and not self.done

    @property
    def is_due(self) -> bool:
        """Whether the arm is to be evaluated after the step that it has made."""
        every = self.task.spec.training.eval_steps
        return self.pauses or (every is not None and (self.step % every == 0 or self.done))

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return self._schedule.learning_rate(self.step)

    def window(self, step: int | None = None) -> list[list[Encoded]]:
        """The rows of an optimizer step, counted from 0, by default the next: one list for each micro-batch."""
        first = (self.step if step is None else step) * self.accumulation
        return [
            [self.task.train[index] for index in self._sampler.indices(micro_step)]
            for micro_step in range(first, first + self.accumulation)
        ]

    def dropout(self, micro_step: int) -> DropoutKey | None:
        """The key of the masks of one micro-batch of the next step."""
        if self.task.spec.lora.lora_dropout == 0:
            return None
        return DropoutKey(seed=self.task.spec.seed, step=self.step, micro_step=micro_step)

    def grad_norm(self) -> torch.Tensor:
        """Norm of the gradient, a scalar on the arm's device."""
        return get_total_norm([each.grad for each in self.parameters.values() if each.grad is not None])

    def update(self, grad_norm: torch.Tensor) -> None:
        """Clip, make the optimizer step, and forget the gradient."""
        limit = self.task.spec.training.max_grad_norm
        if limit > 0:
            clip_grads_with_norm_(self.parameters.values(), limit, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.forget_gradient()
        self.step += 1

    def is_finite(self) -> bool:
        """Whether all matrices are finite: an update can overflow although loss and gradient did not."""
        return bool(torch.isfinite(get_total_norm([each.detach() for each in self.parameters.values()])))

    def forget_gradient(self) -> None:
        """Drop the gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """Copy stored matrices into the adapter.

        Raises:
            ConfigError: Names or shapes are not those of this arm.
        """
        expected = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != found:
            odd = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
            name = odd[0]
            raise ConfigError(
                f"the adapter in {source} does not fit arm {self.task.spec.short}: {len(odd)} matrices differ, the "
                f"first is {name}: the arm has {expected.get(name, 'none')}, the file {found.get(name, 'none')}; "
                "lora.r and lora.target_modules must be those of the adapter that is continued"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    @torch.no_grad()
    def _take_over_scaling(self, config: LoraConfig) -> None:
        """Let the arm begin as what the adapter computes, scaling * B A, where its own scaling is another."""
        lora = self.task.spec.lora
        own = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
        for name, parameter in self.parameters.items():
            module, _, matrix = name.removeprefix(PREFIX).rpartition(".lora_")
            if matrix == "B.weight":
                parameter.mul_(scaling_of(config, module, rank=lora.r) / own)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's state under the matrices' names."""
        return state_tensors(self.optimizer, self.parameters)

    def load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take AdamW's state back, as `optimizer_tensors` gave it."""
        load_state(self.optimizer, self.parameters, tensors)

    @cached_property
    def _schedule(self) -> Schedule:
        training = self.task.spec.training
        return Schedule(
            kind=training.lr_scheduler_type,
            peak=training.learning_rate,
            warmup=training.warmup(self.total_steps),
            total=self.total_steps,
        )

    @cached_property
    def _sampler(self) -> Sampler:
        training = self.task.spec.training
        lengths = None
        if training.train_sampling_strategy == "group_by_length":
            lengths = tuple(len(row.input_ids) for row in self.task.train)
        return Sampler(len(self.task.train), training.per_device_train_batch_size, self.task.spec.seed, lengths)
