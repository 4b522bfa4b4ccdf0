"""Multimodal wrappers (Gemma 3, Mistral 3, Qwen2.5-VL, ...): their text model is loaded, without its towers.

Modules keep the names that they have in the wrapper, so that an adapter fits the whole model too. Where transformers
cannot build the wrapper, as for Gemma 3n without timm, the text model is loaded under its own names.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.utils import is_timm_available

from rankwise.compat.transformers import model_class_of
from rankwise.experiment.module_names import TOWERS, in_tower


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How a causal language model of a configuration is loaded.

    Attributes:
        model_class: What `from_pretrained` is called on; None for the automatic class.
        config: In place of the files' own configuration; None for that.
        key_mapping: Renames tensors of the files: patterns and replacements.
        wrapped: The class without towers; that of the architecture.
    """

    model_class: Any = None
    config: Any = None
    key_mapping: dict[str, str] | None = None
    wrapped: Any = None


def loading_of(config: Any, *, towers: bool = False) -> Loading:
    """How to load a configuration's text model, or all of it with `towers`; `wrapped` is None if there is no class."""
    kind, text = type(config), config.get_text_config()
    causal = model_class_of(config)
    if text is config:
        return Loading(wrapped=causal)
    if causal is not None and causal.config_class is type(text) and not towers:
        return Loading(wrapped=causal)  # transformers takes the text model of such wrappers itself.
    is_whole = causal is not None and causal.config_class is kind
    whole = causal if is_whole else MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(kind, None)
    if whole is None:
        return Loading(wrapped=causal)
    if towers:
        return Loading(model_class=whole, wrapped=whole)
    if _needs_more_packages(config) and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        text_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
        return Loading(
            model_class=text_class,
            config=text,
            key_mapping={r"^model\.language_model\.": "model."},
            wrapped=text_class,
        )
    return Loading(model_class=without_towers(whole), wrapped=whole)


def build(config: Any, *, towers: bool = False) -> Any:
    """A model of a configuration without weights, as `loading_of` loads it; call it on the meta device.

    Raises:
        ValueError: There is no causal language model for it.
    """
    loading = loading_of(config, towers=towers)
    source = config if loading.config is None else loading.config
    automatic = (
        AutoModelForCausalLM
        if model_class_of(source) is loading.wrapped or loading.model_class is None
        else AutoModelForImageTextToText
    )
    model = automatic.from_config(source, attn_implementation="eager", trust_remote_code=False)
    return model if towers else drop_towers(model)


@lru_cache
def without_towers(model_class: Any) -> Any:
    """A class of the same name whose models lose their towers before any weight is loaded."""

    class TextOnly(model_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            drop_towers(self)

    TextOnly.__name__, TextOnly.__qualname__ = model_class.__name__, model_class.__qualname__
    TextOnly.__module__ = model_class.__module__
    return TextOnly


def drop_towers(model: Any) -> Any:
    """Remove the towers of a wrapper, in place; other models are left alone."""
    if model.config.get_text_config() is model.config:
        return model
    for owner in (model, model.base_model):
        for name, _ in list(owner.named_children()):
            if name in TOWERS:
                setattr(owner, name, None)
    return model


def has_towers(model: Any) -> bool:
    """Whether a model has a vision or audio tower."""
    return any(in_tower(name) for name, _ in model.named_modules())


def _needs_more_packages(config: Any) -> bool:
    """Whether transformers cannot build the towers with what is installed: Gemma 3n's vision tower is timm's."""
    return getattr(getattr(config, "vision_config", None), "model_type", "") == "gemma3n_vision" and (
        not is_timm_available()
    )
