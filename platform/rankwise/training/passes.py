"""In how many forward passes the arms of a micro-step go through the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How arms are split. It decides last bits of the results, so it is kept with the checkpoints.

    Attributes:
        parts: The arms are cut into so many runs of one length (or fewer, where arms are few).
        max_tokens: Each run is cut again where its rows times its longest row exceed this; None for no limit. A single
            arm is never cut.
    """

    parts: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse what leaves no pass."""
        if self.parts < 1:
            raise ValueError(f"parts must be at least 1, got {self.parts}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1 or None, got {self.max_tokens}")

    def split(self, items: Sequence[T], size: Callable[[T], tuple[int, int]]) -> Iterator[list[T]]:
        """Cut arms into passes, in their order.

        Args:
            items: The arms, or what stands for them.
            size: Rows of an arm in this micro-step, and tokens of the longest of them.
        """
        run = math.ceil(len(items) / self.parts)
        for start in range(0, len(items), run):
            group: list[T] = []
            rows = longest = 0
            for item in items[start : start + run]:
                count, length = size(item)
                rows, longest = rows + count, max(longest, length)
                if group and self.max_tokens is not None and rows * longest > self.max_tokens:
                    yield group
                    group, rows, longest = [], count, length
                group.append(item)
            yield group

    def finer(self, arms: int) -> Passes:
        """Twice as many parts, but no more than there are arms."""
        return replace(self, parts=min(2 * self.parts, arms))
