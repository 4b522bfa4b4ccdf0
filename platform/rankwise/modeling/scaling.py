"""Rank and scaling of one module, as an adapter's configuration says."""

from __future__ import annotations

import math

from peft import LoraConfig
from peft.utils.other import get_pattern_key


def scaling_of(config: LoraConfig, module: str, *, rank: int) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023), of one module.

    Args:
        config: The adapter's configuration; `alpha_pattern` gives some modules an alpha of their own.
        module: The module's full name in the base.
        rank: The module's rank, which `rank_pattern` may set apart.
    """
    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), config.lora_alpha))
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def rank_of(config: LoraConfig, module: str) -> int:
    """The rank that the configuration gives a module; `rank_pattern` gives some modules one of their own."""
    patterns = config.rank_pattern or {}
    return int(patterns.get(get_pattern_key(patterns.keys(), module), config.r))
