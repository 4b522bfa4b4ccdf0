"""An arm while it is in a pack: its adapter, optimizer, data order and counters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rankwise.data.encoding import Encoded
from rankwise.data.sampler import Sampler
from rankwise.exceptions import ConfigError
from rankwise.modeling.adapter import PREFIX, read_adapter
from rankwise.modeling.lora_random import DropoutKey
from rankwise.modeling.packed_lora import adapter_parameters, create_adapter, delete_adapter
from rankwise.modeling.scaling import scaling_of
from rankwise.training.optimizers import load_state, make_optimizer, state_tensors
from rankwise.training.schedule import Schedule
from rankwise.training.values import ArmTask


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
                config, tensors = read_adapter(task.init_adapter)
                self.load(tensors, str(task.init_adapter))
                self._take_over_scaling(config)
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
