"""What a placer of workers on a cluster is asked for, finds, and makes. Plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one worker asks of a node, in Ray's terms."""

    cpus: float = 1.0
    gpus: float = 1.0

    def __str__(self) -> str:
        return f"{self.gpus:g} GPU and {self.cpus:g} CPU"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A living node of the cluster."""

    node_id: str
    address: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A worker on the cluster.

    Attributes:
        name: Of its actor.
        state: `running`, or `pending` when it has no place yet or its node does not answer.
        host: Where it runs; None while it is pending.
        node_id: Of the node.
        pid: Of its process.
    """

    name: str
    state: str
    host: str | None = None
    node_id: str | None = None
    pid: int | None = None

    def to_json(self) -> dict[str, Any]:
        """One worker of `rankwise cluster status --json`."""
        return asdict(self)
