"""The loop over the steps of a pack: who joins, steps, is evaluated and saved, pauses and leaves.

- The state of a base's model while a pack is trained.
- Train a pack: one arm or many over one base, each as if alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rankwise.compat.transformers import checkpointable_layers
from rankwise.exceptions import ConfigError, JobError, is_out_of_memory
from rankwise.experiment.schema import GREATER_IS_BETTER
from rankwise.logs import bound
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.lora.lean import keep_dequantized, lean_8_bit_layers, lean_feed_forwards
from rankwise.modeling.lora.packed import delete_adapter, install
from rankwise.training.arm import ArmOutcome, ArmTask, LivingArm, PackObserver, StepRecord
from rankwise.training.assess import METRICS, Assessor
from rankwise.training.budget import default_token_budget, plan_pack, usual_pass
from rankwise.training.checkpoint import Checkpoints
from rankwise.training.step import Nonfinite, Passes, PeakMemory, Stepper, give_back

logger = logging.getLogger(__name__)

Evaluate = Callable[[Sequence[str]], Mapping[str, Mapping[str, float]]]
"""Given names of adapters in the base's model, the metrics of each under its name."""
UNFINISHED = ("paused", "stopped")
"""How arms end that can go on."""


class PackLoop:
    """The arms of a pack, and the loop over their steps."""

    def __init__(
        self,
        base: LoadedBase,
        tasks: Sequence[ArmTask],
        checkpoints: Checkpoints,
        observer: PackObserver,
        evaluate: Evaluate | None,
        passes: Passes,
    ) -> None:
        """Inject the arms' adapters, and put the arms into the states that they have on disk.

        Raises:
            ConfigError: An arm does not fit the base.
            JobError: Out of memory with what the arms keep for the whole training.
        """
        self._base = base
        self._checkpoints = checkpoints
        self._observer = observer
        self._evaluate = evaluate
        self._memory = PeakMemory(base.device)
        self._arms: list[LivingArm] = []
        self._outcomes: dict[str, ArmOutcome] = {}
        self._pack_step = 0
        self._passes = passes
        pad = base.tokenizer.pad_token_id
        # Any token pads as well as another: padding is neither attended to nor supervised.
        self._pad_token_id = 0 if pad is None else int(pad)
        try:
            self._begin(tasks)
        except BaseException as error:
            self.close()
            if is_out_of_memory(error):
                raise JobError(
                    f"out of memory with the adapters and optimizers of {len(tasks)} arms on {base.device}: train "
                    f"fewer together (--max-arms), lower lora.r, or set training.optim to adamw_bnb_8bit: {error}"
                ) from error
            raise

    def close(self) -> None:
        """Take the adapters out of the base."""
        for arm in self._arms:
            delete_adapter(self._base.model, arm.name)
        self._arms = []

    def run(self, should_stop: Callable[[], bool], should_leave: Callable[[str], bool]) -> dict[str, ArmOutcome]:
        """Step until no arm is left or a stop is asked for."""
        stepper = Stepper(self._base.model, install(self._base.model), self._pad_token_id, self._memory, self._passes)
        assessor = Assessor(self._base.model, install(self._base.model), stepper.logits, self._pad_token_id)
        self._leave_done()
        self._pause(assessor)
        while self._arms:
            leaving = [arm for arm in self._arms if should_leave(arm.spec_hash)]
            if should_stop() or len(leaving) == len(self._arms):
                self._stop()
                return self._outcomes
            for arm in leaving:
                if self._is_sound(arm):
                    self._checkpoints.put_aside(arm)
                    self._part_with(arm, self._stopped(arm))
            self._pack_step += 1
            results = stepper.step(self._arms)
            self._passes = stepper.passes
            for spec_hash, result in results.items():
                if isinstance(result, StepRecord):
                    self._observer.on_step(spec_hash, result)
                else:
                    self._fail(next(arm for arm in self._arms if arm.spec_hash == spec_hash), result)
            self._assess(assessor, [arm for arm in self._arms if arm.is_due])
            self._leave_done()
            self._pause(assessor)
            if self._arms and self._pack_step % min(arm.task.spec.training.save_steps for arm in self._arms) == 0:
                self._save()
        if any(outcome.status in UNFINISHED for outcome in self._outcomes.values()):
            self._checkpoints.save(self._pack_step, [], self._outcomes, self._passes)
        else:
            self._checkpoints.drop_generations()
        return self._outcomes

    def _begin(self, tasks: Sequence[ArmTask]) -> None:
        generation = self._checkpoints.newest()
        if generation is None:
            self._passes = self._checkpoints.first_passes(self._passes)
        else:
            self._passes = generation.passes
            self._pack_step = generation.pack_step
            ended = generation.ended.items()
            self._outcomes.update({each: outcome for each, outcome in ended if outcome.status not in UNFINISHED})
        for task in tasks:
            spec_hash = task.spec.spec_hash
            if spec_hash in self._outcomes:
                continue
            arm = LivingArm(task, self._base.model)
            self._arms.append(arm)
            state = None if generation is None else generation.states.get(spec_hash)
            if generation is None or spec_hash in generation.ended:
                state = self._checkpoints.newest_of(spec_hash)
            if state is not None:
                state.restore(arm)
                with bound(arm=task.spec.short):
                    logger.info("arm %s goes on from step %d of %d", task.spec.short, arm.step, arm.total_steps)
            self._observer.on_start(spec_hash, arm.step, arm.total_steps)

    def _save(self) -> None:
        for arm in list(self._arms):
            self._is_sound(arm)
        directory = self._checkpoints.save(self._pack_step, self._arms, self._outcomes, self._passes)
        self._observer.on_checkpoint(self._pack_step, directory)

    def _stop(self) -> None:
        self._save()
        for arm in list(self._arms):
            self._part_with(arm, self._stopped(arm))

    def _stopped(self, arm: LivingArm) -> ArmOutcome:
        return self._outcome(arm, "stopped", f"stopped on request after step {arm.step} of {arm.total_steps}")

    def _pause(self, assessor: Assessor) -> None:
        """Part with the arms that have come to their `stop_at`, now or in another pack."""
        pausing = [arm for arm in self._arms if arm.pauses and self._is_sound(arm)]
        self._assess(assessor, [arm for arm in pausing if arm.evaluated != arm.step])
        for arm in pausing:
            self._checkpoints.put_aside(arm)
            reason = f"paused after step {arm.step} of {arm.total_steps}"
            self._part_with(arm, self._outcome(arm, "paused", reason))

    def _assess(self, assessor: Assessor, due: Sequence[LivingArm]) -> None:
        if not due:
            return
        if self._evaluate is None:
            found: Mapping[str, Mapping[str, float]] = assessor.assess(due)
        else:
            by_name = self._evaluate([arm.name for arm in due])
            found = {arm.spec_hash: by_name[arm.name] for arm in due}
        for arm in due:
            metrics = dict(found[arm.spec_hash])
            arm.metrics.update(metrics)
            arm.evaluated = arm.step
            self._observer.on_evaluation(arm.spec_hash, arm.step, metrics)
            primary = arm.task.spec.evaluation.primary_metric
            if primary in metrics and _is_better(metrics[primary], arm, primary):
                self._checkpoints.save_best(arm, metrics[primary])

    def _leave_done(self) -> None:
        for arm in [arm for arm in self._arms if arm.done]:
            if self._is_sound(arm):
                self._leave(arm, self._outcome(arm, "finished", None))

    def _is_sound(self, arm: LivingArm) -> bool:
        """Whether an arm's weights may be stored; if not it leaves, before anything takes them for good ones."""
        if arm.is_finite():
            return True
        ids = tuple(row.id for rows in arm.window(arm.step - 1) for row in rows)
        self._fail(arm, Nonfinite(what="weights", step=arm.step, number=math.nan, example_ids=ids))
        return False

    def _fail(self, arm: LivingArm, problem: Nonfinite) -> None:
        shown = ", ".join(problem.example_ids[:5]) + (" ..." if len(problem.example_ids) > 5 else "")
        reason = f"nonfinite_{problem.what}: {problem.number} at step {problem.step}, rows {shown}"
        with bound(arm=arm.task.spec.short):
            logger.warning("arm %s stops: %s", arm.task.spec.short, reason)
        self._leave(arm, self._outcome(arm, "nonfinite", reason, problem.example_ids))

    def _leave(self, arm: LivingArm, outcome: ArmOutcome) -> None:
        self._part_with(arm, self._checkpoints.finish(arm, outcome))

    def _part_with(self, arm: LivingArm, outcome: ArmOutcome) -> None:
        self._arms.remove(arm)
        delete_adapter(self._base.model, arm.name)
        self._outcomes[arm.spec_hash] = outcome
        self._observer.on_end(outcome)

    def _outcome(
        self, arm: LivingArm, status: str, reason: str | None, example_ids: tuple[str, ...] = ()
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


def _is_better(value: float, arm: LivingArm, primary: str) -> bool:
    if value != value:
        return False
    if arm.best is None:
        return True
    return value > arm.best.value if primary in GREATER_IS_BETTER else value < arm.best.value


@contextmanager
def training_mode(model: Any, *, gradient_checkpointing: bool) -> Iterator[None]:
    """Prepare a model for training adapters, and give it back in evaluation mode.

    The model stays in evaluation mode: dropout of the base itself would draw from the global generator, so that an arm
    would depend on its neighbours. bitsandbytes' layers alone are switched to training: in evaluation mode they may
    repack their weights for a kernel without a backward.

    Gradient checkpointing wraps the blocks here, since transformers does it in training mode only, and then also makes
    the embeddings ask for a gradient that nobody needs.

    Raises:
        ConfigError: Gradient checkpointing is asked for and the architecture has no blocks to checkpoint.
    """
    model.eval()
    if any(
        isinstance(module, nn.Dropout) and module.p > 0 and "lora_dropout" not in name
        for name, module in model.named_modules()
    ):
        logger.info("the base's own dropout is off in training; only the adapters' is drawn")
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
    """A block's forward that keeps its input only and runs again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        self._forward = type(block).forward.__get__(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        # No state of the global generator to keep: nothing draws from it.
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def train_pack(
    base: LoadedBase,
    tasks: Sequence[ArmTask],
    *,
    directory: Path,
    observer: PackObserver | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    should_leave: Callable[[str], bool] = lambda spec_hash: False,
    evaluate: Evaluate | None = None,
    parts: int | None = None,
    max_pack_tokens: int | None = None,
) -> dict[str, ArmOutcome]:
    """Train arms together, from their newest checkpoints if there are any.

    One pack step is one optimizer step of every arm that is still in the pack. An arm leaves when its steps are done or
    when its loss or gradient is not finite, and for a time when its `stop_at` is reached; the others go on, untouched.
    The base's model is as before when this returns or raises.

    Args:
        base: The loaded base, without adapters of these arms.
        tasks: The arms. They must share base and quantization (`ArmSpec.pack_key`).
        directory: Root of checkpoints and results; may be shared by all packs of a home.
        observer: Told of steps, evaluations, checkpoints and ends.
        should_stop: Asked before each pack step; when it says True all arms are saved and end as `stopped`.
        should_leave: The same for a single arm, by spec hash: it ends as `stopped`, the others go on.
        evaluate: Replaces the evaluation at `eval_steps`, for primary metrics that need generation; the default
            computes loss, perplexity and token accuracy over the supervised tokens.
        parts: In how many forward passes the arms of a micro-step go through the base; by `plan_pack` when left out.
        max_pack_tokens: Tokens of a forward pass, with padding; by `plan_pack` when left out. Arms that were started
            together before go on as they were split then.

    Returns:
        The outcome of every arm, by spec hash. Arms whose results are in `directory` already are not trained again if
        all arms of the same pack are there.

    Raises:
        ConfigError: Arms do not differ, have no rows, do not fit the base, or ask for evaluations they have no rows
            or no metric for.
        JobError: Out of memory with a single arm.
        StorageError: A checkpoint cannot be written.
    """
    _check(tasks, evaluate)
    observer = observer or PackObserver()
    checkpoints = Checkpoints(directory, [task.spec.spec_hash for task in tasks], base)
    known = checkpoints.outcomes()
    if len(known) == len(tasks):
        for outcome in known.values():
            observer.on_end(outcome)
        return known
    if parts is None:
        plan = plan_pack(base, tasks, token_budget=max_pack_tokens)
        logger.info("%s", plan.estimate.text())
        passes = plan.passes
    else:
        passes = Passes(parts=parts, max_tokens=max_pack_tokens or default_token_budget(base))
    checkpointing = any(task.spec.training.gradient_checkpointing for task in tasks)
    give_back()
    with (
        training_mode(base.model, gradient_checkpointing=checkpointing),
        keep_dequantized(base.model, tokens=usual_pass(tasks, passes.max_tokens)),
        lean_8_bit_layers(base.model),
        lean_feed_forwards(base.model),
    ):
        pack = PackLoop(base, tasks, checkpoints, observer, evaluate, passes)
        try:
            return pack.run(should_stop, should_leave)
        finally:
            pack.close()
            give_back()


def _check(tasks: Sequence[ArmTask], evaluate: Evaluate | None) -> None:
    problems = []
    if not tasks:
        problems.append("a pack needs at least one arm")
    if len({task.spec.spec_hash for task in tasks}) < len(tasks):
        problems.append("two arms of the pack are the same; each may be given once")
    if len({task.spec.pack_key for task in tasks}) > 1:
        problems.append("the arms of the pack do not share base, quantization and gradient checkpointing")
    for task in tasks:
        spec = task.spec
        if not task.train:
            problems.append(f"arm {spec.short} has no training rows")
        if spec.training.eval_steps is not None and not task.evaluation:
            problems.append(f"arm {spec.short}: training.eval_steps is set, but there are no evaluation rows")
        if task.stop_at is not None and not task.evaluation:
            problems.append(
                f"arm {spec.short}: it is to be evaluated at step {task.stop_at}, but there are no rows for it"
            )
        primary = spec.evaluation.primary_metric
        if spec.checkpoint == "best" and evaluate is None and primary not in METRICS:
            problems.append(
                f"arm {spec.short}: the best checkpoint by {primary} needs an evaluation that generates; "
                f"without one the primary metric must be one of {', '.join(METRICS)}"
            )
    if problems:
        raise ConfigError("\n".join(problems), tuple(problems))
