"""How much of a base is really in 4 bit.

bitsandbytes quantizes linear layers. Experts of mixtures are parameters with a dimension of experts, and stay in 16
bit: of Qwen3-30B-A3B, that is 97 % of the weights. Counted are matrices and stacks of matrices, without embeddings and
the output head, which stay in 16 bit in every 4-bit base.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch

from rankwise.compat.peft import base_name, plain_module
from rankwise.compat.transformers import is_conv1d, quantizable_modules

EXPECTED_SHARE = 0.9
"""A base in 4 bit with a smaller share gives a warning."""
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class QuantizedShare:
    """Weights in 4 bit, and the others by name (layers together), largest first."""

    quantized: int
    others: Mapping[str, int]

    @property
    def share(self) -> float:
        """Share of the weights that are in 4 bit, from 0 to 1."""
        total = self.quantized + sum(self.others.values())
        return round(self.quantized / total, 6) if total else 0.0

    @property
    def warning(self) -> str | None:
        """What is not in 4 bit, if that is much."""
        if self.share >= EXPECTED_SHARE:
            return None
        total = self.quantized + sum(self.others.values())
        named = [f"{name} ({count / total:.1%})" for name, count in list(self.others.items())[:_SHOWN]]
        more = len(self.others) - len(named)
        return (
            f"only {self.share:.1%} of the weights are in 4 bit, though load_in_4bit is true; in 16 bit stay "
            + ", ".join(named)
            + (f" and {more} others" if more > 0 else "")
            + ". bitsandbytes quantizes linear layers; experts of mixtures are none"
        )


def share_of_loaded(model: Any) -> QuantizedShare:
    """Count a loaded model; adapters do not count."""
    quantized = {
        base_name(f"{name}.weight"): module
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    numbers = {name: module.in_features * module.out_features for name, module in quantized.items()}
    return _count(model, numbers)


def share_of_skeleton(model: Any, config: Any) -> QuantizedShare:
    """Count a model without weights, as bitsandbytes would quantize it; `config` is a `config.json`'s content."""
    return _count(model, {f"{name}.weight": inputs * outputs for name, (inputs, outputs) in quantizable(model, config)})


def quantizable(model: Any, config: Any) -> list[tuple[str, tuple[int, int]]]:
    """The linear layers of a model without weights that bitsandbytes would quantize, with their (inputs, outputs)."""
    stored = config.get("quantization_config") if isinstance(config, Mapping) else None
    skipped = (stored or {}).get("llm_int8_skip_modules")
    return [(name, _shape(module)) for name, module in quantizable_modules(model, skipped)]


def _shape(module: Any) -> tuple[int, int]:
    if is_conv1d(module):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)


def _count(model: Any, quantized: Mapping[str, int]) -> QuantizedShare:
    apart = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    head = plain_module(model.get_output_embeddings())
    if head is not None:
        apart.add(id(head.weight))
    others: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        plain = base_name(name)
        if plain in quantized or id(parameter) in apart or parameter.dim() < 2 or "lora_" in name:
            continue
        others[re.sub(r"\.\d+(?=\.)", "", plain)] += parameter.numel()
    return QuantizedShare(quantized=sum(quantized.values()), others=dict(others.most_common()))
