"""Private names of transformers. Checked with transformers 5.24.0.

transformers is imported by the functions that need it: this module costs nothing at import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def attention_of(config: Any) -> str | None:
    """The attention implementation that a model runs: `sdpa`, `eager`, `flash_attention_2`, ...

    A configuration takes `attn_implementation` as an argument, but has no public attribute to read it from.
    """
    attention: str | None = config._attn_implementation
    return attention


# The head is named too: naming any module replaces the default.
_NEVER_QUANTIZED = {"mamba": ["lm_head", "dt_proj"], "falcon_mamba": ["lm_head", "dt_proj"]}


def never_quantized(config: Any) -> list[str] | None:
    """Linear layers that bitsandbytes must leave alone, in place of transformers' default; None for the default.

    These architectures read the weights of such layers instead of calling the layers. No public attribute tells.
    """
    return _NEVER_QUANTIZED.get(config.model_type)


def quantizable_modules(model: Any, skipped: list[str] | None = None) -> list[tuple[str, Any]]:
    """The linear layers of a model that transformers lets bitsandbytes quantize, by name.

    Args:
        model: A model, with or without weights.
        skipped: The `llm_int8_skip_modules` of a quantized checkpoint.
    """
    from torch import nn
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = HfQuantizer.get_modules_to_not_convert(
        model, skipped or never_quantized(model.config), model._keep_in_fp32_modules
    )
    return [
        (name, module)
        for name, module in model.named_modules()
        # Subclasses, such as Falcon's, are not quantized.
        if (type(module) is nn.Linear or is_conv1d(module)) and should_convert_module(name, patterns)
    ]


def model_class_of(config: Any) -> Any:
    """The class of causal language model that transformers would build for a configuration; None if there is none.

    The mapping is public, but some of its values are tuples that only a private function resolves.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.auto_factory import _get_model_class

    return (
        _get_model_class(config, MODEL_FOR_CAUSAL_LM_MAPPING) if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    )


def supported_attention(model_class: type) -> tuple[str, ...]:
    """The attention implementations that a model class supports, without kernels from the hub.

    transformers raises for others when it builds the model; before that, only these attributes tell.
    """
    flags = {
        "sdpa": "_supports_sdpa",
        "flash_attention_2": "_supports_flash_attn",
        "flex_attention": "_supports_flex_attn",
    }
    names = [name for name, flag in flags.items() if getattr(model_class, flag, False)]
    # Set where only other kernels compute what the architecture needs, such as attention sinks.
    compatible = getattr(model_class, "_compatible_flash_implementations", None)
    if compatible is not None and "flash_attention_2" not in compatible:
        names = [name for name in names if name != "flash_attention_2"]
    return (*names, "eager")


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


@contextmanager
def experts_as_saved() -> Iterator[None]:
    """Load a pre-quantized model with its experts as `save_pretrained` wrote them, inside the block.

    transformers replaces the experts of some pre-quantized models (Llama 4) by linear layers, one for each expert, as
    in published checkpoints. A model that it quantized and saved itself does not have those. There is no setting.
    """
    from transformers.quantizers import base

    theirs = base.MODULES_TO_PATCH_FOR_QUANTIZATION
    base.MODULES_TO_PATCH_FOR_QUANTIZATION = {}
    try:
        yield
    finally:
        base.MODULES_TO_PATCH_FOR_QUANTIZATION = theirs


def is_router(module: Any) -> bool:
    """Whether a linear layer is the router of a mixture, which returns several tensors and cannot have an adapter.

    The classes have nothing in common but their names.
    """
    return "Router" in type(module).__name__


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


@contextmanager
def known_packing(sequences: Any) -> Iterator[None]:
    """Say inside the block which tokens of a batch belong together, where a model gets no attention mask.

    transformers finds it out from position ids, and makes the CPU wait for the GPU to see whether there is any packing.
    It also makes masks of bools, which torch's attention turns into numbers in each layer, and keeps each for the
    backward pass. Here they are numbers from the start, so that all layers share one.

    Args:
        sequences: (B, T) integers, equal for tokens of one sequence; None where each row is one.
    """
    import torch
    from transformers import masking_utils

    masks = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    theirs, make = masking_utils.find_packed_sequence_indices, masks["sdpa"]

    def numbers(*args: Any, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = make(*args, dtype=dtype, **kwargs)
        if mask is None or mask.dtype != torch.bool:
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))

    masking_utils.find_packed_sequence_indices = lambda position_ids: sequences
    if sequences is not None:
        masks["sdpa"] = numbers
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = theirs
        if sequences is not None:
            del masks["sdpa"]


@contextmanager
def attention_by_rows(spans: Callable[[], Sequence[Sequence[int]] | None]) -> Iterator[None]:
    """Run attention of the kind `sdpa` inside the block for each row of shared sequences by itself, without a mask.

    The registry of attention functions is documented, but not the way to have another one for a while.

    Args:
        spans: Gives the lengths of the rows in each sequence of the current batch, which add up to all of its tokens;
            None where sequences are not shared.
    """
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    theirs = functions["sdpa"]

    def own(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        lengths = spans()
        if lengths is None:
            return theirs(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
        outputs = []
        for number, rows in enumerate(lengths):
            pieces, start = [], 0
            for length in rows:
                place = slice(start, start + length)
                parts = (each[number : number + 1, :, place] for each in (query, key, value))
                # A mask of the whole sequence holds a sliding window.
                part = None if mask is None else mask[min(number, len(mask) - 1)][None, :, place, place]
                pieces.append(theirs(module, *parts, part, **kwargs)[0])
                start = place.stop
            outputs.append(torch.cat(pieces, dim=1))
        return torch.cat(outputs), None

    functions["sdpa"] = own
    try:
        yield
    finally:
        del functions["sdpa"]
