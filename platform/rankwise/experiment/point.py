"""One arm as a sweep gives it: the fields that it overrides, and where each value stands in the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rankwise.experiment.document import KeyPath
from rankwise.experiment.fields import show


@dataclass(frozen=True, kw_only=True)
class Point:
    """The overrides of one arm, by dotted field path, and the key path where each value stands in the file."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, KeyPath] = field(default_factory=dict)
    home: KeyPath = ("sweep",)
    fixed: frozenset[str] = frozenset()
    """Axes with one value, which tell nothing apart."""

    @property
    def label(self) -> str:
        """`lora.r=8, seed=0`."""
        told = {path: value for path, value in self.values.items() if path not in self.fixed}
        return ", ".join(f"{path}={bare(value)}" for path, value in told.items())


def bare(value: Any) -> str:
    """A value as a label shows it: `8`, `all-linear`, `q_proj,v_proj`."""
    if isinstance(value, list):
        return ",".join(map(bare, value))
    return value if isinstance(value, str) else show(value)
