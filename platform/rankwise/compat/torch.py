"""Private names of torch. Checked with torch 2.13.0; names also in the sources of 2.14.1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def compilation_refused() -> Iterator[None]:
    """Let `torch.compile` raise inside the block, so that code which tries it keeps its plain functions.

    Replaces the module's attribute: no public switch stops a call of `torch.compile` from importing the compiler.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("functions are not compiled here")

    compiler, torch.compile = torch.compile, refuse
    try:
        yield
    finally:
        torch.compile = compiler


def is_view(tensor: torch.Tensor) -> bool:
    """Whether autograd tracks a tensor as a view of another one.

    Autograd refuses in-place changes of views that a custom function returned, and only `Tensor._is_view` tells them.
    """
    return tensor._is_view()


def create_adamw_state(optimizer: torch.optim.AdamW) -> None:
    """Create the states that a fused AdamW creates in its first step, before it.

    The keys and shapes of the state are undocumented. The public API creates them in `step` only, after the backward
    pass: an optimizer that runs out of memory there may have updated half of the parameters.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
