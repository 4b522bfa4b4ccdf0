"""Batch inference: rows of a table or of a program, answered by several adapters over one base."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.inference.predictor import Answer, Predictor

__all__ = ["Answer", "Predictor"]


def __getattr__(name: str) -> Any:
    # Late: it pulls in torch and MLflow, which the reading of tables does not need.
    if name in __all__:
        return getattr(importlib.import_module("rankwise.inference.predictor"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
