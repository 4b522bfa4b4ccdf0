"""Batch inference: rows of a table or of a program, answered by several adapters over one base."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.inference.answer import Answer
    from rankwise.inference.predictor import Predictor

__all__ = ["Answer", "Predictor"]


def __getattr__(name: str) -> Any:
    # Late: it pulls in torch and MLflow, which the reading of tables does not need.
    if name in __all__:
        module = importlib.import_module(f"rankwise.inference.{name.lower()}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
