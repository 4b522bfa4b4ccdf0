"""The state of a base's model while a pack is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rankwise.exceptions import ConfigError

logger = logging.getLogger(__name__)


@contextmanager
def training_mode(model: Any, *, gradient_checkpointing: bool) -> Iterator[None]:
    """Prepare a model for training adapters, and give it back in evaluation mode.

    The model stays in evaluation mode: dropout of the base itself would draw from the global generator, so that an arm
    would depend on its neighbours. bitsandbytes' layers alone are switched to training: in evaluation mode they may
    repack their weights for a kernel without a backward.

    Gradient checkpointing wraps the blocks here, since transformers does it in training mode only, and then also makes
    the embeddings ask for a gradient that nobody needs.

    Raises:
        ConfigError: Gradient checkpointing is asked for and the architecture has no blocks to checkpoint.
    """
    model.eval()
    if any(
        isinstance(module, nn.Dropout) and module.p > 0 and "lora_dropout" not in name
        for name, module in model.named_modules()
    ):
        logger.info("the base's own dropout is off in training; only the adapters' is drawn")
    quantized = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if gradient_checkpointing and not blocks:
        raise ConfigError(
            f"training.gradient_checkpointing: {type(model).__name__} has no blocks to checkpoint; set it to false"
        )
    for module in quantized:
        module.training = True
    if gradient_checkpointing:
        for block in blocks:
            block.forward = _Checkpointed(block)
    try:
        yield
    finally:
        for module in quantized:
            module.training = False
        if gradient_checkpointing:
            for block in blocks:
                del block.forward


class _Checkpointed:
    """A block's forward that keeps its input only and runs again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        self._forward = type(block).forward.__get__(block)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        # No state of the global generator to keep: nothing draws from it.
        return checkpoint(self._forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
