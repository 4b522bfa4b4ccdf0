"""The engine's records as points in MLflow, as movement of the progress bar, and as progress of the jobs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rankwise.experiment.arm import ArmSpec
from rankwise.logs import bind
from rankwise.tracking.runs import Run
from rankwise.training.values import ArmOutcome, PackObserver, StepRecord

Tell = Callable[[str, Mapping[str, Any], bool], None]
"""Given a spec hash, how far its arm is, and whether that must not be left out."""


class Curves(PackObserver):
    """Writes each arm's curves to its run."""

    def __init__(
        self,
        arms: Mapping[str, tuple[Run, ArmSpec]],
        advance: Callable[[int], None],
        note: Callable[[str], None],
        tell: Tell = lambda spec_hash, values, always: None,
        ended: Callable[[ArmOutcome], None] = lambda outcome: None,
    ) -> None:
        """Write to the run of each arm, by spec hash; `tell` hears how far each arm is, `ended` how it ended."""
        self._arms = arms
        self._advance = advance
        self._note = note
        self._tell = tell
        self._ended = ended
        self._furthest = 0
        self._living: dict[str, int] = {}

    def on_start(self, spec_hash: str, step: int, total_steps: int) -> None:
        """An arm begins, perhaps in the middle."""
        self._living[spec_hash] = total_steps
        if step > self._furthest:
            self._advance(step - self._furthest)
            self._furthest = step
        self._tell(spec_hash, {"phase": "train", "step": step, "steps": total_steps}, True)

    def on_step(self, spec_hash: str, record: StepRecord) -> None:
        """An arm has made a step."""
        bind(step=record.step)
        run, arm = self._arms[spec_hash]
        if record.step > self._furthest:
            self._advance(record.step - self._furthest)
            self._furthest = record.step
        self._note(f"loss {record.loss:.3f}")
        speed = record.tokens / record.seconds if record.seconds > 0 else 0.0
        self._tell(
            spec_hash,
            {
                "phase": "train",
                "step": record.step,
                "steps": self._living.get(spec_hash),
                "loss": record.loss if record.loss == record.loss else None,
                "tokens_per_second": round(speed, 1),
            },
            False,
        )
        if record.step % arm.training.logging_steps and record.step != 1:
            return
        run.metrics(
            {
                "train.loss": record.loss,
                "train.learning_rate": record.learning_rate,
                "train.grad_norm": record.grad_norm,
                "train.tokens_per_second": speed,
            },
            record.step,
        )

    def on_evaluation(self, spec_hash: str, step: int, metrics: Mapping[str, float]) -> None:
        """An arm was evaluated during training."""
        self._arms[spec_hash][0].metrics(metrics, step)

    def on_checkpoint(self, step: int, directory: Path) -> None:
        """All living arms were saved."""
        for spec_hash in self._living:
            self._tell(spec_hash, {"checkpoint": step}, True)

    def on_end(self, outcome: ArmOutcome) -> None:
        """An arm left the pack."""
        self._living.pop(outcome.spec_hash, None)
        self._ended(outcome)
