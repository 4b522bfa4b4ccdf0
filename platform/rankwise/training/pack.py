"""Train a pack: one arm or many over one base, each as if alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from rankwise.exceptions import ConfigError
from rankwise.modeling.base import LoadedBase
from rankwise.modeling.dequantized import keep_dequantized
from rankwise.modeling.eight_bit import lean_8_bit_layers
from rankwise.modeling.feed_forward import lean_feed_forwards
from rankwise.training.assess import METRICS
from rankwise.training.budget import default_token_budget, plan_pack, usual_pass
from rankwise.training.checkpoint import Checkpoints
from rankwise.training.loop import Evaluate, PackLoop
from rankwise.training.memory import give_back
from rankwise.training.mode import training_mode
from rankwise.training.passes import Passes
from rankwise.training.values import ArmOutcome, ArmTask, PackObserver, StepRecord

__all__ = ["ArmOutcome", "ArmTask", "Evaluate", "PackObserver", "StepRecord", "train_pack"]

logger = logging.getLogger(__name__)


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
