"""Private names of transformers. Checked with transformers 5.24.0.

transformers is imported by the functions that need it: this module costs nothing at import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def attention_of(config: Any) -> str | None:
    """The attention implementation that a model runs: `sdpa`, `eager`, `flash_attention_2`, ...

    A configuration takes `attn_implementation` as an argument, but has no public attribute to read it from.
    """
    attention: str | None = config._attn_implementation
    return attention


def note_injected_adapter(model: Any) -> None:
    """Record that a transformers model has adapters, as its own `add_adapter` does; other models are left alone.

    peft's `inject_adapter_in_model` does not record it: then `model.disable_adapters` raises, and `save_pretrained`
    stores the base. `add_adapter` would activate the adapter and make it trainable.
    """
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True


def is_conv1d(module: Any) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is (in_features, out_features).

    The class is undocumented, and no `torch.nn.Linear`.
    """
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def checkpointable_layers(model: Any) -> list[Any]:
    """The layers of a model that transformers would run with gradient checkpointing, in order.

    The public `activation_checkpointing_enable` works in training mode only, and makes the embedding's output require a
    gradient.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def gguf_progress(wrap: Callable[[Any], Iterator[Any]]) -> Iterator[None]:
    """Replace the progress bar over a GGUF file's tensors inside the block.

    transformers always draws it: `disable_progress_bar` has no effect on it.

    Args:
        wrap: Takes the tensors, yields each of them.
    """
    from transformers import modeling_gguf_pytorch_utils as reader

    theirs = reader.tqdm
    reader.tqdm = lambda items, **_: wrap(items)
    try:
        yield
    finally:
        reader.tqdm = theirs
