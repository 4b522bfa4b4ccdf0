"""One run of the benchmark: what was asked for, how much time is left, what is loaded."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.gate import TOLERANCE, Gate, loss_rounding
from benchmarks.subjects import Subject, Workload, eight_billion, make_workload, mixed_ranks, smollm2, tiny
from rankwise.data.batches import collate
from rankwise.modeling.base import LoadedBase
from rankwise.settings import Settings

SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "smollm2": lambda directory: smollm2(),
    "tiny": tiny,
    "8b": eight_billion,
}


class OutOfTime(Exception):
    """The rest does not fit into the time that was given."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        subject: A key of `SUBJECTS`.
        device: `cpu` or `cuda`.
        micro_batches: Rows of an arm's step, one table each.
        packs: Sizes of packs.
        rounds: Times that the ways of the throughput part alternate.
        steps: Steps of a block of the throughput part; the first is not counted.
        sweep_steps: Steps of an arm of the short sweep.
        sweep_arms: Its arms.
        sampled_arms: Arms that P1 trains for the sweep; the rest is extrapolated.
        halving_steps: Steps of an arm of the sweep with successive halving over the subject's base.
        small_steps: The same of the sweeps over a small base.
        halving_seeds: The seeds of these sweeps.
        pretraining_steps: Steps in which the small base is made.
        trl: Whether TRL takes part.
        full: Every arm of P1, and every arm of P2 and the plain loop in each round.
        minutes: No block begins that would not end by then; None for no limit.
        threads: Threads of torch; None for its default.
    """

    subject: str = "smollm2"
    device: str = "cpu"
    micro_batches: tuple[int, ...] = (1, 4)
    packs: tuple[int, ...] = (1, 2, 4, 8, 16)
    rounds: int = 3
    steps: int = 3
    sweep_steps: int = 16
    sweep_arms: int = 8
    sampled_arms: int = 2
    halving_steps: int = 80
    small_steps: int = 128
    halving_seeds: tuple[int, ...] = tuple(range(10))
    pretraining_steps: int = 600
    trl: bool = True
    full: bool = False
    minutes: float | None = None
    threads: int | None = None


@dataclass(kw_only=True)
class Bench:
    """Options, clock and bases of one run. Bases are loaded once: one for the engine, one for peft and TRL."""

    options: Options
    out: Path
    settings: Settings
    say: Callable[[str], None]
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rankwise-benchmark-")))
    began: float = field(default_factory=time.monotonic)

    @cached_property
    def subject(self) -> Subject:
        lasting = self.options.subject == "8b"
        return SUBJECTS[self.options.subject](self.settings.cache / "benchmark" if lasting else self.scratch)

    @cached_property
    def base(self) -> LoadedBase:
        """The engine's base."""
        return self.workload(1, steps=1).load()

    @cached_property
    def reference(self) -> Any:
        """The model that peft and TRL train over."""
        return self.workload(1, steps=1).load().model

    @cached_property
    def rounding(self) -> float:
        """What the gate allows for torch's cross entropy, in nats."""
        rows = self.workload(1, steps=1).rows
        return loss_rounding(self.reference, collate([rows[index] for index in range(min(16, len(rows)))], 0))

    def gate(self) -> Gate:
        """An empty gate for this base and dtype."""
        tolerance = TOLERANCE[str(self.base.compute_dtype).removeprefix("torch.")]
        return Gate(tolerance=tolerance, rounding=self.rounding if self.options.trl else 0.0)

    def workload(self, micro_batch: int, *, steps: int) -> Workload:
        """Arms of one micro-batch size that make `steps` steps."""
        return make_workload(
            self.subject,
            self.scratch / f"{micro_batch}-{steps}",
            self.settings,
            device=self.options.device,
            micro_batch=micro_batch,
            steps=steps,
            points=mixed_ranks(max(*self.options.packs, self.options.sweep_arms)),
            sweep_arms=self.options.sweep_arms,
        )

    def check_time(self, seconds: float) -> None:
        """Whether something that takes about `seconds` may begin.

        Raises:
            OutOfTime: It would not end in time.
        """
        if self.options.minutes is None:
            return
        left = self.options.minutes * 60 - (time.monotonic() - self.began)
        if seconds > left:
            raise OutOfTime(f"the next block takes about {seconds:,.0f} s, {max(0.0, left):,.0f} s are left")
