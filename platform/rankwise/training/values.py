"""What goes into a training and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rankwise.data.encoding import Encoded
from rankwise.experiment.arm import ArmSpec


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
