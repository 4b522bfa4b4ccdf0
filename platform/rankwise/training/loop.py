"""`train_pack`: trains the arms of a pack together over one base, each as if it were alone.

1. Restore the arms from their newest checkpoints, or start new ones.
2. Make one optimizer step of every arm (`rankwise.training.step`).
3. Evaluate the arms that are due; remove arms that are finished, paused, stopped or non-finite.
4. Save a generation of checkpoints every `save_steps`; repeat from 2 while arms are left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rankwise.compat.transformers import attention_by_rows, checkpointable_layers
from rankwise.exceptions import ConfigError, JobError, is_out_of_memory
from rankwise.experiment.metric_names import GREATER_IS_BETTER, SOURCE_PREFIX
from rankwise.logs import bound
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.lora.lean import keep_dequantized, lean_8_bit_layers, lean_feed_forwards
from rankwise.modeling.lora.logits import SupervisedLogits
from rankwise.modeling.lora.packed import delete_adapter, install
from rankwise.training.arm import (
    ArmOutcome,
    ArmTask,
    PackObserver,
    StepRecord,
    TrainingArm,
    join_arms,
    part_arms,
)
from rankwise.training.budget import plan_pack, typical_pass_tokens
from rankwise.training.checkpoint import Checkpoints
from rankwise.training.evaluation import METRICS, TrainingEvaluator
from rankwise.training.optimizer import PackOptimizer
from rankwise.training.step import NonFiniteStep, Passes, PeakMemory, Stepper, release_freed_memory

logger = logging.getLogger(__name__)

UNFINISHED = ("paused", "stopped")  # arms that can resume


class PackLoop:
    """The arms of a pack and the loop over its steps."""

    def __init__(
        self,
        base: LoadedBase,
        tasks: Sequence[ArmTask],
        logits: SupervisedLogits,
        checkpoints: Checkpoints,
        observer: PackObserver,
        passes: Passes,
    ) -> None:
        self._base = base
        self._logits = logits
        self._checkpoints = checkpoints
        self._observer = observer
        self._memory = PeakMemory(base.device)
        self._arms: list[TrainingArm] = []
        self._outcomes: dict[str, ArmOutcome] = {}
        self._pack_step = 0
        self._passes = passes
        self._optimizer: PackOptimizer
        pad = base.tokenizer.pad_token_id
        # Any token can pad: padding is neither attended to nor supervised.
        self._pad_token_id = 0 if pad is None else int(pad)
        try:
            self._restore(tasks)
        except BaseException as error:
            self.close()
            if is_out_of_memory(error):
                raise JobError(
                    f"out of memory with the adapters and optimizers of {len(tasks)} arms on {base.device}: train "
                    f"fewer together (--max-arms), lower lora.r, or set training.optim to adamw_bnb_8bit: {error}"
                ) from error
            raise

    def close(self) -> None:
        """Remove the adapters from the base."""
        for arm in self._arms:
            delete_adapter(self._base.model, arm.name)
        self._arms = []
        part_arms(self._base.model)
        self._checkpoints.close()

    def run(self, should_stop: Callable[[], bool], should_leave: Callable[[str], bool]) -> dict[str, ArmOutcome]:
        """Step until no arm is left or a stop is requested."""
        if self._arms and not self._step_all(should_stop, should_leave):
            return self._outcomes
        self._checkpoints.wait()
        self._report_checkpoints()
        if any(outcome.status in UNFINISHED for outcome in self._outcomes.values()):
            self._checkpoints.save(self._pack_step, [], self._outcomes, self._passes)
        else:
            self._checkpoints.drop_generations()
        return self._outcomes

    def _step_all(self, should_stop: Callable[[], bool], should_leave: Callable[[str], bool]) -> bool:
        """Step until no arm is left; False if a stop was requested."""
        model, routing = self._base.model, install(self._base.model)
        stepper = Stepper(model, routing, self._optimizer, self._logits, self._pad_token_id, self._memory, self._passes)
        evaluator = TrainingEvaluator(model, routing, self._logits, self._pad_token_id)
        self._finish_done()
        self._pause(evaluator)
        while self._arms:
            leaving = [arm for arm in self._arms if should_leave(arm.spec_hash)]
            if should_stop() or len(leaving) == len(self._arms):
                self._stop()
                return False
            for arm in leaving:
                if self._keep_if_finite(arm):
                    self._checkpoints.save_aside(arm)
                    self._remove(arm, self._stopped_outcome(arm))
            self._report_checkpoints()
            self._pack_step += 1
            results = stepper.step(self._arms)
            self._passes = stepper.passes
            for spec_hash, result in results.items():
                if isinstance(result, StepRecord):
                    self._observer.on_step(spec_hash, result)
                else:
                    self._fail(next(arm for arm in self._arms if arm.spec_hash == spec_hash), result)
            self._evaluate_due(evaluator, [arm for arm in self._arms if arm.is_evaluation_due])
            self._finish_done()
            self._pause(evaluator)
            if self._arms and self._pack_step % min(arm.task.spec.training.save_steps for arm in self._arms) == 0:
                self._save()
        return True

    def _restore(self, tasks: Sequence[ArmTask]) -> None:
        generation = self._checkpoints.newest()
        if generation is None:
            self._passes = self._checkpoints.initial_passes(self._passes)
        else:
            self._passes = generation.passes
            self._pack_step = generation.pack_step
            ended = generation.ended.items()
            self._outcomes.update({key: outcome for key, outcome in ended if outcome.status not in UNFINISHED})
        for task in tasks:
            spec_hash = task.spec.spec_hash
            if spec_hash in self._outcomes:
                continue
            self._arms.append(TrainingArm(task, self._base.model))
        if self._arms:
            self._optimizer = join_arms(self._base.model, self._arms, self._base.compute_dtype)
        for arm in self._arms:
            spec_hash, short = arm.spec_hash, arm.task.spec.short
            state = None if generation is None else generation.states.get(spec_hash)
            if generation is None or spec_hash in generation.ended:
                state = self._checkpoints.newest_state(spec_hash)
            if state is not None:
                state.restore(arm)
                with bound(arm=short):
                    logger.info("arm %s resumes from step %d of %d", short, arm.step, arm.total_steps)
            self._observer.on_start(spec_hash, arm.step, arm.total_steps)

    def _save(self) -> None:
        for arm in list(self._arms):
            self._keep_if_finite(arm)
        self._checkpoints.begin(self._pack_step, self._arms, self._outcomes, self._passes)
        self._report_checkpoints()

    def _report_checkpoints(self) -> None:
        for step, directory in self._checkpoints.published():
            self._observer.on_checkpoint(step, directory)

    def _stop(self) -> None:
        self._save()
        self._checkpoints.wait()
        self._report_checkpoints()
        for arm in list(self._arms):
            self._remove(arm, self._stopped_outcome(arm))

    def _stopped_outcome(self, arm: TrainingArm) -> ArmOutcome:
        return self._outcome(arm, "stopped", f"stopped on request after step {arm.step} of {arm.total_steps}")

    def _pause(self, evaluator: TrainingEvaluator) -> None:
        """Remove the arms that have reached their `stop_at`, now or in an earlier pack."""
        pausing = [arm for arm in self._arms if arm.should_pause and self._keep_if_finite(arm)]
        self._evaluate_due(evaluator, [arm for arm in pausing if arm.evaluated != arm.step])
        for arm in pausing:
            self._checkpoints.save_aside(arm)
            reason = f"paused after step {arm.step} of {arm.total_steps}"
            self._remove(arm, self._outcome(arm, "paused", reason))

    def _evaluate_due(self, evaluator: TrainingEvaluator, due: Sequence[TrainingArm]) -> None:
        if not due:
            return
        evaluations = evaluator.evaluate(due)
        for arm in due:
            metrics = dict(evaluations[arm.spec_hash])
            arm.metrics.update(metrics)
            arm.evaluated = arm.step
            self._observer.on_evaluation(arm.spec_hash, arm.step, metrics)
            training, primary = arm.task.spec.training, arm.task.spec.evaluation.primary_metric
            if primary not in metrics:
                continue
            # A rung between two evaluations does not count.
            if training.eval_steps is not None and arm.step % training.eval_steps == 0:
                improved = _is_better(metrics[primary], arm, primary, by_more_than=training.early_stopping_threshold)
                arm.without_improvement = 0 if improved else arm.without_improvement + 1
            if _is_better(metrics[primary], arm, primary):
                self._checkpoints.save_best(arm, metrics[primary])

    def _finish_done(self) -> None:
        for arm in [arm for arm in self._arms if arm.done]:
            if self._keep_if_finite(arm):
                self._finish(arm, self._outcome(arm, "finished", _why_early(arm)))

    def _keep_if_finite(self, arm: TrainingArm) -> bool:
        """Whether an arm's weights are finite; if not, the arm leaves before they are stored."""
        if self._optimizer.is_finite(arm.name):
            return True
        ids = tuple(row.id for rows in arm.micro_batches(arm.step - 1) for row in rows)
        self._fail(arm, NonFiniteStep(quantity="weights", step=arm.step, number=math.nan, example_ids=ids))
        return False

    def _fail(self, arm: TrainingArm, problem: NonFiniteStep) -> None:
        shown = ", ".join(problem.example_ids[:5]) + (" ..." if len(problem.example_ids) > 5 else "")
        reason = f"nonfinite_{problem.quantity}: {problem.number} at step {problem.step}, rows {shown}"
        with bound(arm=arm.task.spec.short):
            logger.warning("arm %s stops: %s", arm.task.spec.short, reason)
        self._finish(arm, self._outcome(arm, "nonfinite", reason, problem.example_ids))

    def _finish(self, arm: TrainingArm, outcome: ArmOutcome) -> None:
        self._remove(arm, self._checkpoints.finish(arm, outcome))

    def _remove(self, arm: TrainingArm, outcome: ArmOutcome) -> None:
        self._arms.remove(arm)
        self._optimizer.remove(arm.name)
        delete_adapter(self._base.model, arm.name)
        self._outcomes[arm.spec_hash] = outcome
        self._observer.on_end(outcome)

    def _outcome(
        self, arm: TrainingArm, status: str, reason: str | None, example_ids: tuple[str, ...] = ()
    ) -> ArmOutcome:
        best = arm.best
        return ArmOutcome(
            spec_hash=arm.spec_hash,
            status=status,  # type: ignore[arg-type]
            steps=arm.step,
            adapter=None,
            reason=reason,
            metrics=dict(arm.metrics),
            seconds=arm.seconds,
            peak_memory_bytes=self._memory.bytes,
            best=best.directory if best else None,
            best_step=best.step if best else None,
            best_value=best.value if best else None,
            example_ids=example_ids,
        )


def _is_better(value: float, arm: TrainingArm, primary: str, *, by_more_than: float = 0.0) -> bool:
    """Whether a value is better than the best one so far, as transformers' EarlyStoppingCallback compares."""
    if value != value:
        return False
    if arm.best is None:
        return True
    gain = value - arm.best.value if primary in GREATER_IS_BETTER else arm.best.value - value
    return gain > by_more_than


def _why_early(arm: TrainingArm) -> str | None:
    if not arm.stopped_early or arm.step >= arm.total_steps:
        return None
    reason = (
        f"stopped early after step {arm.step} of {arm.total_steps}: {arm.task.spec.evaluation.primary_metric} did not "
        f"improve in {arm.without_improvement} evaluations"
    )
    with bound(arm=arm.task.spec.short):
        logger.info("arm %s %s", arm.task.spec.short, reason)
    return reason


@contextmanager
def training_mode(model: Any, *, gradient_checkpointing: bool) -> Iterator[None]:
    """Prepare a model for training adapters, and restore it on exit.

    Only bitsandbytes' layers are in training mode: in evaluation mode they may repack their weights for a kernel
    without a backward pass. The base's own dropout would make arms depend on each other through the global generator.
    Blocks are checkpointed here, because transformers does that in training mode only.

    Raises:
        ConfigError: Gradient checkpointing is on and the architecture has no blocks to checkpoint.
    """
    model.eval()
    if any(
        isinstance(module, nn.Dropout) and module.p > 0 and "lora_dropout" not in name
        for name, module in model.named_modules()
    ):
        logger.info("the base's own dropout is off in training; only the adapters' dropout is on")
    quantized = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    blocks = checkpointable_layers(model)
    if gradient_checkpointing and not blocks:
        raise ConfigError(
            f"training.gradient_checkpointing: {type(model).__name__} has no blocks to checkpoint; set it to false"
        )
    for module in quantized:
        module.training = True
    if gradient_checkpointing:
        for block in blocks:
            block.forward = _Checkpointed(block)
    try:
        yield
    finally:
        for module in quantized:
            module.training = False
        if gradient_checkpointing:
            for block in blocks:
                del block.forward


class _Checkpointed:
    """A block's forward that stores only its input and is recomputed in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        self._forward = type(block).forward.__get__(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        # Nothing draws from the global generator, so its state is not saved.
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def train_pack(
    base: LoadedBase,
    tasks: Sequence[ArmTask],
    *,
    directory: Path,
    observer: PackObserver | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_leave: Callable[[str], bool] = lambda spec_hash: False,
) -> dict[str, ArmOutcome]:
    """Train arms together, from their newest checkpoints if there are any.

    A pack step is one optimizer step of every arm. An arm that leaves does not affect the others. Afterwards the base's
    model is as before.

    Args:
        base: The loaded base, without adapters of these arms.
        tasks: The arms. They must share base and quantization (`ArmSpec.pack_key`).
        directory: Root of checkpoints and results; may be shared by all packs of a home.
        observer: Receives the pack's events.
        should_stop: Called before each pack step; if True, all arms are saved and end as `stopped`.
        should_leave: The same for a single arm, by spec hash.

    Returns:
        Outcomes by spec hash. If `directory` has the results of all arms, nothing is trained.

    Raises:
        ConfigError: The arms do not form a pack, do not match the base, or lack rows or a metric.
        JobError: Out of memory with a single arm.
        StorageError: A checkpoint cannot be written.
    """
    _validate(tasks)
    observer = observer or PackObserver()
    checkpoints = Checkpoints(directory, [task.spec.spec_hash for task in tasks], base)
    known = checkpoints.outcomes()
    if len(known) == len(tasks):
        for outcome in known.values():
            observer.on_end(outcome)
        return known
    checkpointing = any(task.spec.training.gradient_checkpointing for task in tasks)
    release_freed_memory()
    with (
        training_mode(base.model, gradient_checkpointing=checkpointing),
        lean_8_bit_layers(base.model),
        lean_feed_forwards(base.model) as lean,
        attention_by_rows(lambda: install(base.model).spans),
    ):
        logits = SupervisedLogits(base.model)
        plan = plan_pack(base, tasks, lean=lean > 0, direct=logits.direct)
        logger.info("%s", plan.estimate.text())
        with keep_dequantized(base.model, tokens=typical_pass_tokens(tasks, plan.passes.max_tokens)):
            pack = PackLoop(base, tasks, logits, checkpoints, observer, plan.passes)
            try:
                return pack.run(should_stop, should_leave)
            finally:
                pack.close()
                release_freed_memory()


def _validate(tasks: Sequence[ArmTask]) -> None:
    problems = []
    if not tasks:
        problems.append("a pack needs at least one arm")
    if len({task.spec.spec_hash for task in tasks}) < len(tasks):
        problems.append("two arms of the pack are equal; every arm may be given once only")
    if len({task.spec.pack_key for task in tasks}) > 1:
        problems.append("the arms of the pack do not share base, quantization and gradient checkpointing")
    for task in tasks:
        spec = task.spec
        if not task.train:
            problems.append(f"arm {spec.short} has no training rows")
        if spec.training.eval_steps is not None and not task.evaluation:
            problems.append(f"arm {spec.short}: training.eval_steps is set, but there are no evaluation rows")
        if task.stop_at is not None and not task.evaluation:
            problems.append(f"arm {spec.short}: stop_at is {task.stop_at}, but there are no evaluation rows")
        primary = spec.evaluation.primary_metric
        measured = {*METRICS, *(SOURCE_PREFIX + label for label in task.sources.values())}
        if spec.checkpoint == "best" and primary not in measured:
            problems.append(
                f"arm {spec.short}: choosing the best checkpoint by {primary} needs generation; without it, the "
                f"primary metric must be one of {', '.join(sorted(measured))}"
            )
    if problems:
        raise ConfigError("\n".join(problems), tuple(problems))
