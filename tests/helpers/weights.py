"""Every tensor that decides on a logit, and whether two models have the same ones."""

from __future__ import annotations

from typing import Any


def everything(model: Any) -> dict[str, Any]:
    """All parameters, buffers and quantization states of a model, by name."""
    found = dict(model.state_dict())
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = buffer
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            found[f"absmax {name}"], found[f"code {name}"] = state.absmax, state.code
            found[f"rest {name}"] = (state.blocksize, state.quant_type, state.dtype, tuple(state.shape))
            if state.nested:
                found[f"offset {name}"], found[f"absmax2 {name}"] = state.offset, state.state2.absmax
                found[f"code2 {name}"] = state.state2.code
                found[f"rest2 {name}"] = (state.state2.blocksize, state.state2.dtype)
    return found


def differing(one: Any, other: Any) -> list[str]:
    """The names in which two models differ by as much as one bit, or which only one of them has."""
    mine, theirs = everything(one), everything(other)
    shared = mine.keys() & theirs.keys()
    return sorted((mine.keys() ^ theirs.keys()) | {name for name in shared if not _same(mine[name], theirs[name])})


def _same(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)
