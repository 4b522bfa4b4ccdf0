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


def fused_adamw(
    values: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Make step `step`, counted from 1, of torch's fused AdamW on one contiguous tensor, in place.

    The function behind `torch.optim.AdamW` is in a module without documentation. The optimizer itself would own the
    parameter and its moments, which here are rows of larger tensors that move when an arm leaves.
    """
    from torch.optim.adamw import adamw

    assert all(each.is_contiguous() for each in (values, gradient, *moments)), "fused AdamW is silently wrong on these"
    adamw(
        [values],
        [gradient],
        [moments[0]],
        [moments[1]],
        [],
        [torch.tensor(float(step - 1))],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
