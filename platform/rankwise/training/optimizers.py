"""AdamW as an arm's optimizer: fused and in fp32, or with its moments in 8 bit.

The names are transformers'. The states are made with the optimizer, not with its first step: so an arm has all the
memory that it will ever have for itself before the first step, and running out of it cannot cut an update in half.

8-bit moments are bitsandbytes' (Dettmers et al. 2022, block-wise dynamic quantization in blocks of 256); matrices below
4,096 numbers keep theirs in fp32. bitsandbytes has kernels for them on GPUs, and on CPUs plain loops, which are slow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

from rankwise.exceptions import ConfigError
from rankwise.experiment.schema import TrainingSpec

_BLOCK = 256
_SMALL = 4096
"""Matrices with fewer numbers have moments in fp32."""
# bitsandbytes' tables of 8-bit values are one tensor for all matrices, and constants.
_TABLES = ("qmap1", "qmap2")


def make_optimizer(parameters: Sequence[nn.Parameter], training: TrainingSpec) -> torch.optim.Optimizer:
    """An optimizer with its states.

    Raises:
        ConfigError: A paged optimizer on a device that has no paged memory.
    """
    options: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    if training.optim == "adamw_torch_fused":
        fused = torch.optim.AdamW(parameters, fused=True, **options)
        for parameter in parameters:
            fused.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return fused
    paged = training.optim == "paged_adamw_8bit"
    device = parameters[0].device.type
    if paged and device != "cuda":
        raise ConfigError(
            "training.optim: paged_adamw_8bit keeps moments in memory that a GPU shares with the CPU, and this base "
            f"is on {device}; set it to adamw_bnb_8bit or adamw_torch_fused"
        )
    in_8_bit: torch.optim.Optimizer = bnb.optim.AdamW(
        parameters, optim_bits=8, min_8bit_size=_SMALL, is_paged=paged, **options
    )
    (group,) = in_8_bit.param_groups
    for index, parameter in enumerate(parameters):
        in_8_bit.init_state(group, parameter, 0, index)  # type: ignore[attr-defined]
    return in_8_bit


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's state under the matrices' names."""
    return {
        f"{name}.{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if key not in _TABLES
    }


@torch.no_grad()
def load_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Copy a state back, as `state_tensors` gave it; one from before the first step may have been stored as nothing."""
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key, value in state.items():
            stored = tensors.get(f"{name}.{key}")
            if stored is None:
                assert key in _TABLES or not tensors, f"{key} of {name} is not in the stored state"
            elif isinstance(value, torch.Tensor):
                value.copy_(stored)
            else:
                state[key] = type(value)(stored.item())


def state_bytes(matrices: Sequence[int], training: TrainingSpec) -> int:
    """Bytes of an arm's matrices and gradients in fp32, and of its optimizer.

    Args:
        matrices: How many numbers each matrix has.
        training: Which optimizer.
    """
    if training.optim == "adamw_torch_fused":
        return 16 * sum(matrices)
    return sum(8 * size + (8 * size if size < _SMALL else 2 * size + 8 * -(-size // _BLOCK)) for size in matrices)
