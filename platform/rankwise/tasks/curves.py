"""The engine's records as points in MLflow and as movement of the progress bar."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rankwise.experiment.arm import ArmSpec
from rankwise.tracking.runs import Run
from rankwise.training.values import PackObserver, StepRecord


class Curves(PackObserver):
    """Writes each arm's curves to its run."""

    def __init__(
        self,
        arms: Mapping[str, tuple[Run, ArmSpec]],
        advance: Callable[[int], None],
        note: Callable[[str], None],
    ) -> None:
        """Write to the run of each arm, by spec hash."""
        self._arms = arms
        self._advance = advance
        self._note = note
        self._furthest = 0

    def on_step(self, spec_hash: str, record: StepRecord) -> None:
        """An arm has made a step."""
        run, arm = self._arms[spec_hash]
        if record.step > self._furthest:
            self._advance(record.step - self._furthest)
            self._furthest = record.step
        self._note(f"loss {record.loss:.3f}")
        if record.step % arm.training.logging_steps and record.step != 1:
            return
        run.metrics(
            {
                "train.loss": record.loss,
                "train.learning_rate": record.learning_rate,
                "train.grad_norm": record.grad_norm,
                "train.tokens_per_second": record.tokens / record.seconds if record.seconds > 0 else 0.0,
            },
            record.step,
        )

    def on_evaluation(self, spec_hash: str, step: int, metrics: Mapping[str, float]) -> None:
        """An arm was evaluated during training."""
        self._arms[spec_hash][0].metrics(metrics, step)
