"""This project's way: packs of arms through `train_pack`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.blocks import Block
from benchmarks.meter import Stamp
from benchmarks.subjects import Workload, label
from rankwise.experiment.arm import ArmSpec
from rankwise.modeling.base import LoadedBase
from rankwise.training.arm import ArmTask, PackObserver, StepRecord
from rankwise.training.loop import train_pack


def way_of(size: int) -> str:
    """Name of packs of one size."""
    return f"pack of {size}"


class Marks(PackObserver):
    """The moment at which each pack step ended, and all losses."""

    def __init__(self, device: torch.device) -> None:
        self.stamps: list[Stamp] = []
        self.losses: dict[str, list[float]] = {}
        self._device = device
        self._furthest = 0

    def on_step(self, spec_hash: str, record: StepRecord) -> None:
        # The first arm that is told of a step speaks for all: their steps are made by then.
        if record.step > self._furthest:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.stamps.append(Stamp.now())
            self._furthest = record.step
        self.losses.setdefault(spec_hash, []).append(record.loss)


def train_packed(workload: Workload, base: LoadedBase, arms: Sequence[ArmSpec]) -> Block:
    """Train a pack; nothing of it is kept."""
    marks = Marks(base.device)
    directory = Path(tempfile.mkdtemp(prefix="rankwise-benchmark-"))
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    try:
        train_pack(base, [ArmTask(spec=arm, train=workload.rows) for arm in arms], directory=directory, observer=marks)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    peak = int(torch.cuda.max_memory_allocated(base.device)) if base.device.type == "cuda" else 0
    names = {arm.spec_hash: label(arm) for arm in arms}
    losses = {names[spec_hash]: values for spec_hash, values in marks.losses.items()}
    return Block.of(way_of(len(arms)), marks.stamps, losses, peak)
