"""Module names for `lora.target_modules`: from a local base's weight files, else from a built-in list by model type.

Only the headers of safetensors files are read: the length of a JSON table of contents, then the JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

_LAYER = re.compile(r"\.(\d+)\.")

# Embeddings and output layers are not LoRA targets, since their adapters would depend on the vocabulary.
NOT_TARGETS = frozenset(
    {
        "lm_head", "embed_tokens", "embed_in", "embed_out", "embed_positions", "wte", "wpe", "word_embeddings",
        "tok_embeddings", "output", "score", "shared",
    }
)  # fmt: skip
TOWERS = frozenset(
    {
        "vision_tower", "vision_model", "visual", "vision_encoder", "audio_tower", "audio_model", "embed_vision",
        "embed_audio", "multi_modal_projector", "mm_projector", "connector", "image_newline",
    }
)  # fmt: skip
"""Modules of multimodal wrappers beside the text model."""


def in_tower(name: str) -> bool:
    """Whether a module, or a target that names a path, is in a vision or audio tower."""
    return not TOWERS.isdisjoint(name.split("."))


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NEOX = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
_GPT2 = ("c_attn", "c_proj", "c_fc")
LINEAR_MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "cohere", "cohere2",
            "granite", "olmo", "olmo2", "olmo3", "smollm3", "stablelm", "ministral", "exaone4",
        ),
        _LLAMA,
    ),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "gpt_neox": _NEOX,
    "bloom": _NEOX,
    "falcon": _NEOX,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    "starcoder2": ("q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"),
}  # fmt: skip
_MAX_HEADER = 100 * 2**20


@lru_cache(maxsize=32)
def known_modules(base: Path | None, config: Path | None) -> tuple[tuple[str, ...], str] | None:
    """Module names of a base, and where they come from; None if neither directory nor config.json gives them.

    Raises:
        ValueError: An existing file cannot be read.
    """
    if base is not None and (names := _from_weights(base)):
        return names, f"the weights in {base}"
    for path in (config, base / "config.json" if base else None):
        if path is not None and path.is_file():
            model_type = read_config(path).get("model_type")
            if model_type in LINEAR_MODULES:
                return LINEAR_MODULES[model_type], f"the model type {model_type}"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """Read a base's config.json.

    Raises:
        ValueError: The file cannot be read, or is not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object")
    return config


def _from_weights(base: Path) -> tuple[str, ...]:
    """Last name parts of modules with a two-dimensional weight, without embeddings and output layers."""
    names: dict[str, None] = {}
    for file in sorted(base.glob("*.safetensors")):
        for tensor, entry in _header(file).items():
            module, _, leaf = tensor.rpartition(".")
            if leaf == "weight" and len(entry.get("shape", ())) == 2:
                names[module.rpartition(".")[2]] = None
    return tuple(name for name in names if name not in NOT_TARGETS)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise ValueError(f"{file} is not a safetensors file")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise ValueError(f"the header of {file} cannot be read: {error}") from error
    return {name: entry for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)}


def layer_of(module: str) -> int | None:
    """The layer number of a module: 3 for `model.layers.3.mlp.up_proj`; None outside of layers."""
    match = _LAYER.search(f".{module}.")
    return int(match.group(1)) if match else None


def layer_sums(parameters: Iterable[tuple[str, int]]) -> dict[int | None, int]:
    """Sum (module, parameters) pairs by layer, in the order of the modules."""
    sums: dict[int | None, int] = {}
    for module, count in parameters:
        layer = layer_of(module)
        sums[layer] = sums.get(layer, 0) + count
    return sums
