"""One arm in training: its task, adapter, optimizer, learning rate schedule, counters and outcome.

Schedules follow `transformers.optimization`. 8-bit moments are those of bitsandbytes (Dettmers et al. 2022, block-wise
dynamic quantization); on CPUs its loops are slow. Optimizer states are allocated with the optimizer, not in its first
step, so running out of memory cannot interrupt an update.
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
_SMALL = 4096  # matrices with fewer elements keep their moments in fp32


def make_optimizer(parameters: Sequence[nn.Parameter], training: TrainingSpec) -> torch.optim.Optimizer:
    """Create an arm's optimizer and its states; a paged optimizer on a CPU is a `ConfigError`."""
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
            "training.optim: paged_adamw_8bit needs a CUDA GPU, and this base is on "
            f"{device}; set it to adamw_bnb_8bit or adamw_torch_fused"
        )
    in_8_bit: torch.optim.Optimizer = bnb.optim.AdamW(
        parameters, optim_bits=8, min_8bit_size=_SMALL, is_paged=paged, **options
    )
    create_optimizer_state(in_8_bit)
    return in_8_bit


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's state, keyed by the matrices' names."""
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
    """Load the output of `state_tensors`, which may be empty if it was stored before the first step."""
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
    """Bytes of matrices with these numbers of elements, their gradients in fp32, and their optimizer."""
    if training.optim == "adamw_torch_fused":
        return 16 * sum(matrices)
    return sum(8 * size + (8 * size if size < _SMALL else 2 * size + 8 * -(-size // _BLOCK)) for size in matrices)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate as a pure function of the step; `warmup` and `total` are numbers of optimizer steps."""

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
        evaluation: Rows for evaluation; required by `training.eval_steps` and `stop_at`.
        init_adapter: A PEFT directory to start from, with the arm's rank and modules. Its scaling may differ.
        stop_at: Optimizer steps after which the arm is evaluated, saved and leaves as `paused`. A later pack with a
            larger `stop_at` or None resumes it. The learning rate schedule always spans all steps.
    """

    spec: ArmSpec
    train: Sequence[Encoded]
    evaluation: Sequence[Encoded] | None = None
    init_adapter: Path | None = None
    stop_at: int | None = None

    def __post_init__(self) -> None:
        if self.stop_at is not None and self.stop_at < 1:
            raise ValueError(f"stop_at must be at least 1 or None, got {self.stop_at}")


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step of one arm, counted from 1.

    Attributes:
        loss: Mean negative log likelihood (nats) of the supervised tokens, before the update.
        grad_norm: Norm before clipping.
        tokens: Without padding.
        seconds: The arm's share of the pack step's wall time, by padded tokens.
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
    """How an arm left its pack.

    Attributes:
        status: `finished`: all steps done. `nonfinite`: a loss, gradient or weight was not finite. `paused`: reached
            `stop_at`. `stopped`: on request. A paused or stopped arm has a checkpoint to resume from.
        adapter: PEFT directory: the last state of a finished arm, the last good checkpoint of a non-finite one.
        reason: Why the arm is not finished.
        metrics: The last `train.*`, and `eval.*` of the last evaluation.
        seconds: The steps' shares of wall time, summed over all attempts.
        peak_memory_bytes: While the arm was in the pack: allocated on the GPU, or resident on a CPU.
        best: PEFT directory of the best evaluated state by the primary metric, `best_value`.
        example_ids: Rows of the non-finite step whose own loss is not finite, or all its rows.
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
    """Callbacks, called from the training thread. After a crash, repeated steps are reported again."""

    def on_start(self, spec_hash: str, step: int, total_steps: int) -> None:
        """An arm starts, with `step` of its `total_steps` steps already done."""

    def on_step(self, spec_hash: str, record: StepRecord) -> None:
        """An arm completed an optimizer step."""

    def on_evaluation(self, spec_hash: str, step: int, metrics: Mapping[str, float]) -> None:
        """An arm was evaluated after `step` steps."""

    def on_checkpoint(self, step: int, directory: Path) -> None:
        """All arms in the pack were saved after the pack's step `step`."""

    def on_end(self, outcome: ArmOutcome) -> None:
        """An arm left the pack."""


@dataclass(kw_only=True, eq=False)
class BestState:
    """The best evaluated state so far: adapter directory, step, and value of the primary metric."""

    directory: Path
    step: int
    value: float


class TrainingArm:
    """One arm in a pack: everything except its matrices, which the model holds.

    Attributes:
        name: The adapter's name.
        parameters: The matrices, under their names in a PEFT file.
        step: Optimizer steps done.
        evaluated: The step of the last evaluation; 0 before the first.
    """

    def __init__(self, task: ArmTask, model: Any) -> None:
        """Inject the adapter; a `ConfigError` if the base, `init_adapter` or the optimizer does not match."""
        training = task.spec.training
        self.task = task
        self.name = create_adapter(model, task.spec)
        self.parameters = adapter_parameters(model, self.name)
        try:
            if task.init_adapter is not None:
                initial = read_adapter(task.init_adapter)
                self.load(initial.tensors, str(task.init_adapter))
                self._adopt_scaling(initial.config)
            self.optimizer = make_optimizer(list(self.parameters.values()), training)
        except BaseException:
            delete_adapter(model, self.name)
            raise
        self.step = 0
        self.total_steps = task.spec.optimizer_steps(len(task.train))
        self.seconds = 0.0
        self.tokens = 0
        self.metrics: dict[str, float] = {}
        self.evaluated = 0
        self.best: BestState | None = None

    @property
    def spec_hash(self) -> str:
        """The arm's spec hash."""
        return self.task.spec.spec_hash

    @property
    def accumulation(self) -> int:
        """Number of micro-batches of an optimizer step; the last one of an epoch may have fewer."""
        return self.task.spec.training.gradient_accumulation_steps

    @property
    def done(self) -> bool:
        """Whether all optimizer steps are done."""
        return self.step >= self.total_steps

    @property
    def should_pause(self) -> bool:
        """Whether the arm has reached `stop_at`, unfinished."""
        return self.task.stop_at is not None and self.step >= self.task.stop_at and not self.done

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the arm must be evaluated after its latest step."""
        every = self.task.spec.training.eval_steps
        return self.should_pause or (every is not None and (self.step % every == 0 or self.done))

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next optimizer step."""
        return self._schedule.learning_rate(self.step)

    def micro_batches(self, step: int | None = None) -> list[list[Encoded]]:
        """The rows of an optimizer step, counted from 0, by default the next one: a list for each micro-batch."""
        return [
            [self.task.train[index] for index in self._sampler.indices(micro_step)]
            for micro_step in self.micro_steps(self.step if step is None else step)
        ]

    def micro_steps(self, step: int) -> range:
        """The micro-steps of an optimizer step, counted from 0."""
        return self._sampler.micro_steps(step, self.accumulation)

    def dropout(self, micro_step: int) -> DropoutKey | None:
        """The key of the dropout masks of one micro-batch of the next step; None without dropout."""
        if self.task.spec.lora.lora_dropout == 0:
            return None
        return DropoutKey(seed=self.task.spec.seed, step=self.step, micro_step=micro_step)

    def grad_norm(self) -> torch.Tensor:
        """Norm of the gradient: a scalar tensor on the arm's device."""
        return get_total_norm([parameter.grad for parameter in self.parameters.values() if parameter.grad is not None])

    def update(self, grad_norm: torch.Tensor) -> None:
        """Clip the gradient, make the optimizer step, and drop the gradient."""
        limit = self.task.spec.training.max_grad_norm
        if limit > 0:
            clip_grads_with_norm_(self.parameters.values(), limit, grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.clear_gradients()
        self.step += 1

    def is_finite(self) -> bool:
        """Whether all matrices are finite: an update can overflow even if loss and gradient are finite."""
        return bool(torch.isfinite(get_total_norm([parameter.detach() for parameter in self.parameters.values()])))

    def clear_gradients(self) -> None:
        """Drop the gradient."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        """Copy stored matrices into the adapter; other names or shapes are a `ConfigError`."""
        expected = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        stored = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if expected != stored:
            differing = sorted(name for name in {*expected, *stored} if expected.get(name) != stored.get(name))
            name = differing[0]
            raise ConfigError(
                f"the adapter in {source} does not fit arm {self.task.spec.short}: {len(differing)} matrices differ, "
                f"the first is {name}: the arm has {expected.get(name, 'none')}, the file {stored.get(name, 'none')}; "
                "set lora.r and lora.target_modules to those of the adapter"
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[name])

    @torch.no_grad()
    def _adopt_scaling(self, config: LoraConfig) -> None:
        """Scale B so that the arm's scaling * B A equals the adapter's."""
        lora = self.task.spec.lora
        own = lora.lora_alpha / (math.sqrt(lora.r) if lora.use_rslora else lora.r)
        for name, parameter in self.parameters.items():
            module, _, matrix = name.removeprefix(PREFIX).rpartition(".lora_")
            if matrix == "B.weight":
                parameter.mul_(scaling_of(config, module, rank=lora.r) / own)

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """The optimizer's state, keyed by the matrices' names."""
        return state_tensors(self.optimizer, self.parameters)

    def load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Load the output of `optimizer_tensors`."""
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
        return Sampler(
            len(self.task.train),
            training.per_device_train_batch_size,
            self.task.spec.seed,
            lengths,
            whole_epochs=self.task.spec.rendering > 1,
        )
