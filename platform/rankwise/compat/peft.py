"""Private names of peft, and what it calls the parts of an adapted model. Checked with peft 0.21.2.

peft is imported by the functions that need it: this module costs nothing at import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

SEVERAL_ADAPTERS = (
    "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters in the model. "
    "Make sure to know what you are doing!"
)
"""peft warns with this text for every adapter after the first."""

DEPRECATED_CHECKPOINTING = (
    "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` instead."
)
"""transformers 5.24 warns with this text because `get_peft_model` reads the property."""

TRANSPOSED_WEIGHT = "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True."
"""peft warns with this text for GPT-2's linear layers, and then does the right thing."""

# The modules that peft puts around a base's module, by the names that they add to those of its parameters.
_WRAPPERS = (".token_adapter", ".base_layer", ".original_module")


def base_name(name: str) -> str:
    """The name that a parameter or module of an adapted model has in the base without adapters.

    peft wraps modules in place. It strips these parts itself when it unloads adapters, but has no function for names.
    """
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def plain_module(module: Any) -> Any:
    """An embedding or a head without what peft has wrapped around it.

    The weight of peft's wrapper is a copy of the whole embedding with the adapter's rows in it, made at every access.
    `original_module` of a wrapped module has no public accessor.
    """
    module = getattr(module, "original_module", None) or module
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def is_adapted_linear(module: Any) -> bool:
    """Whether a module is a LoRA layer around a linear layer, judged by its attributes.

    `isinstance` would need peft, whose import takes longer than all that `plan` does with a skeleton.
    """
    return hasattr(module, "base_layer") and hasattr(module, "lora_A") and hasattr(module, "in_features")


def is_plain_lora(layer: Any, adapter: str) -> bool:
    """Whether an adapter of a LoRA layer is neither a variant (DoRA, aLoRA) nor has a bias.

    Only the layer's own dictionaries tell: what an adapter's configuration asks for need not apply to every layer.
    """
    return adapter not in layer.lora_variant and not layer.lora_bias.get(adapter)


def is_parameter_wrapper(layer: Any) -> bool:
    """Whether a LoRA layer adapts a parameter (`target_parameters`, experts of a mixture) instead of a linear layer."""
    from peft.tuners.lora.layer import ParamWrapper

    return isinstance(layer, ParamWrapper)


@contextmanager
def linear_targets_only() -> Iterator[None]:
    """Let target names mean linear layers inside the block.

    For some mixtures (Qwen3-MoE, Qwen3-Next, DeepSeek-V3), peft takes `gate_proj`, `up_proj` and `down_proj` for the
    routed experts, which are parameters and no layers, and drops the shared experts of these names. There is no
    setting for it.
    """
    from peft.utils import transformers_weight_conversion as conversion

    theirs = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = theirs


def target_names(config: Any) -> AbstractContextManager[None]:
    """How the target names of a stored adapter are read: one that peft made for routed experts names parameters."""
    return nullcontext() if config.target_parameters else linear_targets_only()


def deactivate_adapters(layer: Any) -> None:
    """Make no adapter of a layer active.

    After that `delete_adapter` does not activate another one, with a warning. The public `set_adapter` would also
    change which parameters require a gradient.
    """
    layer._active_adapter = []


@contextmanager
def one_active_adapter(layers: Sequence[Any], adapter: str) -> Iterator[None]:
    """Make one adapter active in LoRA layers inside the block; afterwards the former ones are active again.

    The public `set_adapter` and `enable_adapters` would change which parameters require a gradient.
    """
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [adapter], False
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value that a `rank_pattern` or `alpha_pattern` gives a module; `default` where no key matches.

    How keys match is documented by example only, so the undocumented function that peft itself calls decides.
    """
    from peft.utils.other import get_pattern_key

    patterns = patterns or {}
    return patterns.get(get_pattern_key(patterns.keys(), module), default)
