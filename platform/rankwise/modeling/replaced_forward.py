"""Other forwards for some modules, for the time of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced_forward(forwards: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Give modules these forwards inside the block; after it they have those that they had."""
    before = [module.__dict__.get("forward") for module, _ in forwards]
    for module, forward in forwards:
        module.forward = forward
    try:
        yield
    finally:
        for (module, _), kept in zip(forwards, before, strict=True):
            if kept is None:
                del module.forward
            else:
                module.forward = kept
