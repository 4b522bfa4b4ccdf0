"""One arm in training: its task, adapter, learning rate schedule, counters and outcome.

The arms of a pack share an optimizer: `training.optimizer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig

from rankwise.data.batches import Sampler
from rankwise.data.tokens import Encoded
from rankwise.exceptions import ConfigError
from rankwise.experiment.arm import ArmSpec
from rankwise.modeling.adapter import PREFIX, read_adapter, scaling_of
from rankwise.modeling.lora.draws import DropoutKey
from rankwise.modeling.lora.packed import adapter_parameters, create_adapter, delete_adapter, install
from rankwise.modeling.lora.stacks import Stacks
from rankwise.training.optimizer import IN_8_BIT, PackOptimizer
from rankwise.training.schedule import learning_rates


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmTask:
    """One arm to train.

    Attributes:
        evaluation: Rows for evaluation; required by `training.eval_steps` and `stop_at`.
        sources: The label of the source of each of them, by its id; empty where there is only one source.
        init_adapter: A PEFT directory to start from, with the arm's rank and modules. Its scaling may differ.
        stop_at: Optimizer steps after which the arm is evaluated, saved and leaves as `paused`. A later pack with a
            larger `stop_at` or None resumes it. The learning rate schedule always spans all steps.
    """

    spec: ArmSpec
    train: Sequence[Encoded]
    evaluation: Sequence[Encoded] | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
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
        reason: Why the arm is not finished, or has stopped early.
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
    """One arm in a pack: everything except its matrices, which the model holds, and their optimizer's state.

    Attributes:
        name: The adapter's name.
        optimizer: The pack's; set when all of its arms are there.
        parameters: The matrices, under their names in a PEFT file.
        step: Optimizer steps done.
        evaluated: The step of the last evaluation; 0 before the first.
        without_improvement: Evaluations in a row that did not improve the primary metric by more than the threshold.
    """

    def __init__(self, task: ArmTask, model: Any) -> None:
        """Inject the adapter; a `ConfigError` if the base or `init_adapter` does not match."""
        self.task = task
        self.name = create_adapter(model, task.spec)
        self.parameters = adapter_parameters(model, self.name)
        try:
            if task.init_adapter is not None:
                initial = read_adapter(task.init_adapter)
                self.load(initial.tensors, str(task.init_adapter))
                self._adopt_scaling(initial.config)
        except BaseException:
            delete_adapter(model, self.name)
            raise
        self.optimizer: PackOptimizer | None = None
        self.step = 0
        self.total_steps = task.spec.optimizer_steps(len(task.train))
        self.seconds = 0.0
        self.tokens = 0
        self.metrics: dict[str, float] = {}
        self.evaluated = 0
        self.best: BestState | None = None
        self.without_improvement = 0

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
        """Whether all optimizer steps are done, or the arm has stopped early."""
        return self.step >= self.total_steps or self.stopped_early

    @property
    def stopped_early(self) -> bool:
        """Whether as many evaluations in a row brought no improvement as `early_stopping_patience` allows."""
        patience = self.task.spec.training.early_stopping_patience
        return patience is not None and self.without_improvement >= patience

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
        return self._learning_rates(self.step)

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

    @cached_property
    def _learning_rates(self) -> Callable[[int], float]:
        return learning_rates(self.task.spec.training, self.total_steps)

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


def join_arms(model: Any, arms: Sequence[TrainingArm], dtype: torch.dtype) -> PackOptimizer:
    """Move the matrices of a pack's arms into flat storage, and give the arms their common optimizer.

    Args:
        model: The base's model.
        arms: The arms, at least one.
        dtype: That of the base's products.

    Raises:
        ConfigError: A paged optimizer on a CPU.
    """
    stacks = Stacks(model, {arm.name: arm.task.spec.training.optim in IN_8_BIT for arm in arms}, dtype)
    optimizer = PackOptimizer(stacks, {arm.name: arm.task.spec.training for arm in arms})
    install(model).stacks = stacks
    for arm in arms:
        arm.optimizer = optimizer
    return optimizer


def part_arms(model: Any) -> None:
    """End what `join_arms` began, after the arms' adapters are deleted."""
    install(model).stacks = None
