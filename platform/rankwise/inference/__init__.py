"""Batch inference: rows of a table or a program, answered by several adapters over one base."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.inference.predictor import Answer, Predictor

__all__ = ["Answer", "Predictor"]


def __getattr__(name: str) -> Any:
    # Late: it imports torch and MLflow, which reading tables does not need.
    if name in __all__:
        return getattr(importlib.import_module("rankwise.inference.predictor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
