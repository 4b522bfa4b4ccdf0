"""Merges an adapter into its base: one model of 16-bit weights, without layers of peft and without quantization.

Two bases can take an adapter: the 16-bit one that the files hold, or the 4-bit one that the adapter was trained over,
dequantized. The adapter has learnt over the errors of the quantization, so the second is closer to what was trained
and measured; the first is closer to the model that was published. Each merged weight is computed in float32 and rounded
once.
"""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from rankwise.exceptions import AdapterIntegrityError, ConfigError
from rankwise.modeling.adapter import adapter_tensors
from rankwise.modeling.embeddings import add_rows, plain_module
from rankwise.modeling.quiet import expected_warning

_NAME = "merged"
# peft 0.21 wraps a model through a property that transformers 5.24 deprecates.
_DEPRECATED = (
    "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` instead."
)


def take_dequantized(plain: Any, quantized: Any) -> int:
    """Put the dequantized weights of a 4-bit base in the place of an unquantized model's.

    Args:
        plain: The same base, unquantized; its modules get the new weights, in the dtype that the weights were quantized
            from.
        quantized: The 4-bit base, with adapters injected or not.

    Returns:
        How many weights were replaced.

    Raises:
        ConfigError: No layer is quantized in 4 bit.
    """
    count = 0
    for name, module in quantized.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        place = plain.get_submodule(name.replace(".base_layer", ""))
        with torch.no_grad():
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        place.weight = torch.nn.Parameter(weight.to(place.weight.device), requires_grad=False)
        count += 1
    if not count:
        raise ConfigError("no layer of the base is quantized in 4 bit, so there is nothing to dequantize; use 16bit")
    return count


def merge_adapter(plain: Any, config: LoraConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """Merge an adapter into an unquantized base, which is changed.

    While it is done, the weights that the adapter targets are there in float32: 4 bytes a number.

    Args:
        plain: The base; see `take_dequantized`.
        config: The adapter's configuration.
        tensors: Its tensors, as `modeling.adapter.adapter_tensors` names them.
        dtype: Of all parameters of the result.

    Returns:
        A transformers model without a trace of peft, in evaluation mode.

    Raises:
        AdapterIntegrityError: The adapter does not fit, or a merged weight is not finite.
        ConfigError: The adapter changes a weight that the embedding and the head share.
    """
    add_rows(plain, config)
    own = copy.deepcopy(config)
    own.base_model_name_or_path = plain.name_or_path  # peft warns where it is another.
    with torch.random.fork_rng(devices=[]), expected_warning(_DEPRECATED):
        model = get_peft_model(plain, own, adapter_name=_NAME)
    _check_tied(plain)
    places = adapter_tensors(model, _NAME)
    if set(places) != set(tensors):
        differing = sorted(set(places) ^ set(tensors))
        raise AdapterIntegrityError(f"the adapter's tensors do not fit the base: {', '.join(differing[:5])}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            # In float32 whatever they are stored in: peft multiplies A and B in their own dtype.
            places[name].data = tensor.detach().to(places[name].device, torch.float32, copy=True)
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.get_base_layer().to(torch.float32)
        try:
            merged = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise AdapterIntegrityError(f"the adapter cannot be merged: {error}") from error
        for parameter in merged.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(False)
    return merged.eval()


def _check_tied(plain: Any) -> None:
    if not getattr(plain.config, "tie_word_embeddings", False):
        return
    for what, module in (("embedding", plain.get_input_embeddings()), ("head", plain.get_output_embeddings())):
        if isinstance(module, BaseTunerLayer) and module is not plain_module(module):
            raise ConfigError(
                f"the adapter changes the {what}, whose weight the embedding and the head share in this base; merged, "
                "the change would be in both. Load the adapter with rankwise.flavor.load_model instead"
            )
