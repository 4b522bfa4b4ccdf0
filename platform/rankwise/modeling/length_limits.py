"""Lengths at which an architecture changes how it computes, for checks with rows on both sides of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rankwise.modeling.rope import position_limit

_KEYS = (
    "sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_attention",
    "original_max_position_embeddings", "max_position_embeddings", "block_size", "max_seq_len", "mamba_chunk_size",
    "chunk_size",
)  # fmt: skip
# Of a forward pass through the whole model, in floating point operations: about three seconds.
_AFFORDABLE = {"cpu": 3e11, "cuda": 1e15}
_SMALLEST_PROBE = 64


def length_limits(config: Any) -> tuple[int, ...]:
    """Every length limit in a transformers configuration that rows can exceed, sorted."""
    text = config.get_text_config()
    values = text.to_dict()
    positions = position_limit(config)
    found = {
        int(value)
        for section in _sections(values)
        for key, value in section.items()
        if key in _KEYS and isinstance(value, int) and not isinstance(value, bool) and value > 1
    }
    return tuple(sorted(limit for limit in found if positions is None or limit < positions))


def probe_lengths(model: Any, limits: tuple[int, ...]) -> list[int]:
    """Lengths of rows just below and just beyond those limits that a check can afford, and of two short rows."""
    most = affordable_tokens(model)
    positions = position_limit(model.config)
    lengths = {4, 7}
    for limit in limits:
        if limit + 3 <= most:
            lengths |= {max(2, limit - 1), limit + 3}
    return sorted(length for length in lengths if positions is None or length <= positions)


def affordable_tokens(model: Any) -> int:
    """How many tokens a check may run through a model on its device."""
    device = model.get_input_embeddings().weight.device
    parameters = sum(_numbers(parameter) for parameter in model.parameters())
    budget = _AFFORDABLE.get(device.type, _AFFORDABLE["cpu"])
    return max(_SMALLEST_PROBE, int(budget / (2 * max(1, parameters))))


def _numbers(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter; 4-bit ones are packed by two."""
    return parameter.numel() * (2 if parameter.dtype == torch.uint8 else 1)


def _sections(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The mapping and the mappings in it, such as rotary parameters by type of layer."""
    inner = [value for value in values.values() if isinstance(value, Mapping)]
    return [values, *(section for value in inner for section in _sections(value))]
