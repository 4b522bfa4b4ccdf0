"""One way of training, one block of steps: what each gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.meter import Stamp, steps_between


@dataclass(frozen=True, kw_only=True)
class Block:
    """A few steps of one or several arms trained in one way.

    Attributes:
        way: Who trained.
        arms: Arms trained together.
        wall: Seconds of each counted step, of all arms together; the first step of a block is not counted.
        cpu: The same in CPU seconds.
        losses: Of each arm, by label, the loss of each step from the first.
        peak_bytes: Largest memory of the GPU's allocator; 0 on a CPU, where a process is measured as a whole.
    """

    way: str
    arms: int
    wall: list[float]
    cpu: list[float]
    losses: dict[str, list[float]]
    peak_bytes: int = 0

    @classmethod
    def of(cls, way: str, stamps: list[Stamp], losses: dict[str, list[float]], peak_bytes: int = 0) -> Block:
        wall, cpu = steps_between(stamps)
        return cls(way=way, arms=len(losses), wall=wall, cpu=cpu, losses=losses, peak_bytes=peak_bytes)


@dataclass(kw_only=True)
class Samples:
    """All blocks of one way in one part, as seconds of one step of one arm."""

    arms: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def add(self, block: Block) -> None:
        assert block.arms == self.arms, "the blocks of one way train equally many arms"
        self.wall += [value / block.arms for value in block.wall]
        self.cpu += [value / block.arms for value in block.cpu]
        self.peak_bytes = max(self.peak_bytes, block.peak_bytes)

    def to_json(self) -> dict[str, Any]:
        return {"arms": self.arms, "wall": self.wall, "cpu": self.cpu, "peak_bytes": self.peak_bytes}
