"""Adapters that are not plain LoRA (DoRA, a bias): peft's own forward runs them, all rows of a pass through one."""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer

from rankwise.modeling.replaced_forward import replaced_forward


def not_plain(model: Any, adapters: Set[str]) -> list[str]:
    """Those of some adapters that no forward for several adapters takes, sorted."""
    return sorted(
        {
            name
            for layer in _layers(model)
            for name in adapters
            if name in layer.lora_variant or layer.lora_bias.get(name)
        }
    )


@contextmanager
def own_forward(model: Any, adapter: str) -> Iterator[None]:
    """Run peft's own forward through one adapter inside the block; what is active after it is what was before."""
    layers = _layers(model)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    with replaced_forward([(layer, type(layer).forward.__get__(layer)) for layer in layers]):
        try:
            for layer in layers:
                # Not by `set_adapter`, which would ask for gradients of this one and of no other.
                layer._active_adapter, layer._disable_adapters = [adapter], False
            yield
        finally:
            for layer, (active, disabled) in zip(layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
