"""A model without weights: the modules of a configuration on the meta device, in a fraction of a second."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rankwise.exceptions import ConfigError
from rankwise.modeling.quiet import quiet_transformers


def config_from(source: Any) -> Any:
    """A transformers configuration out of the content of a `config.json`; a configuration is taken as it is.

    Raises:
        ConfigError: There is no `model_type`, or this transformers does not know it.
    """
    if not isinstance(source, Mapping):
        return source
    values = dict(source)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ConfigError("the configuration of the base has no model_type, so its architecture is not known")
    try:
        with quiet_transformers():
            return AutoConfig.for_model(model_type, **values)
    except ValueError as error:
        raise ConfigError(
            f"the installed transformers does not know the base's model_type {model_type!r}; upgrade transformers "
            "(models that bring code of their own are never loaded)"
        ) from error


def skeleton(config: Any) -> Any:
    """The causal language model of a configuration, without weights and unquantized, in evaluation mode.

    Args:
        config: A transformers configuration or the content of a `config.json`.

    Raises:
        ConfigError: There is no causal language model for it.
    """
    config = copy.deepcopy(config_from(config))
    # A quantized base has this; the shapes of its modules are those of the unquantized one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"), quiet_transformers():
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except ValueError as error:
        raise ConfigError(f"there is no causal language model of type {config.model_type!r}: {error}") from error
    model.tie_weights()
    return model.eval()


def linear_modules(model: Any) -> dict[str, tuple[int, int]]:
    """Every linear layer a LoRA adapter can target, by full name, as (in_features, out_features); not the head.

    Of an adapted model these are the base's layers under their names before the adapter came.
    """
    head = model.get_output_embeddings()
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):  # GPT-2's linear layer, whose weight is (in_features, out_features).
            found[name] = (int(module.weight.shape[0]), int(module.weight.shape[1]))
            continue
        plain = isinstance(module, torch.nn.Linear) and module is not head and not _inside(name, found)
        # Told by its parts: importing peft takes longer than all that `plan` does with a skeleton.
        adapted = hasattr(module, "base_layer") and hasattr(module, "lora_A") and hasattr(module, "in_features")
        if plain or adapted:
            found[name] = (int(module.in_features), int(module.out_features))
    return found


def _inside(name: str, layers: Mapping[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in layers for end in range(1, len(parts)))
