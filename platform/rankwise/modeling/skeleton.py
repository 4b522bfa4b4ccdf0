"""A model without weights: the modules of a configuration on the meta device, in a fraction of a second."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

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
        plain = isinstance(module, torch.nn.Linear) and module is not head and not _inside(name, found)
        if plain or isinstance(module, LoraLayer):
            found[name] = (int(module.in_features), int(module.out_features))
    return found


def inject(model: Any, config: LoraConfig, adapter_name: str) -> None:
    """Put adapter layers without weights into a skeleton."""
    inject_adapter_in_model(copy.deepcopy(config), model, adapter_name, low_cpu_mem_usage=True)


def _inside(name: str, layers: Mapping[str, Any]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in layers for end in range(1, len(parts)))
