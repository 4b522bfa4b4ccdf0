"""Is the base in memory the one in a directory? And which commit of a hub repository is it?

Compared are the input embedding and the tensors of one dimension (norms, biases): they are never quantized, they are
small, and any training of a base moves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import safe_open

from rankwise.assets.weights import weight_files
from rankwise.exceptions import BaseMismatchError, ConfigError
from rankwise.modeling.embeddings import plain_module

# What peft puts into the names of a base's parameters.
_WRAPPERS = (".token_adapter", ".base_layer", ".original_module")


def load_dtype(model: Any) -> torch.dtype | None:
    """The dtype that 4-bit weights were quantized from, and come back in; None without any."""
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            dtype: torch.dtype = state.dtype
            return dtype
    return None


def first_difference(model: Any, directory: Path) -> str | None:
    """The name of the first compared tensor that is another one in the directory's files, or None."""
    wanted = dict(_compared(model))
    loaded = load_dtype(model)
    for path in weight_files(directory):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names: list[str] = sorted(set(file.keys()) & set(wanted))
            for name in names:
                memory = wanted[name].detach().cpu()
                stored = file.get_tensor(name)
                rows = min(len(stored), len(memory))  # An embedding may have been resized.
                if stored.shape[1:] != memory.shape[1:]:
                    return name
                # Through the dtype it was loaded in, which may have been a narrower one than it is in now.
                seen = stored[:rows].to(loaded or memory.dtype).to(memory.dtype)
                if not torch.equal(seen, memory[:rows]):
                    return name
    return None


def check_same(model: Any, directory: Path, source: str) -> None:
    """Refuse a directory that holds another base than the one in memory.

    Raises:
        BaseMismatchError: A compared tensor differs.
    """
    name = first_difference(model, directory)
    if name is not None:
        raise BaseMismatchError(
            f"base {source} is not the base of the model in memory: tensor {name} differs in {directory}; say which "
            "base it was loaded from (base=..., base_revision=...)"
        )


def commit_in_memory(model: Any, repo: str) -> str:
    """The commit of a hub repository that a model was loaded from; transformers 5 keeps no note of it.

    Found among the snapshots in Hugging Face's cache by their content.

    Raises:
        ConfigError: None of them, or more than one, has the tensors that are in memory.
    """
    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    found = sorted(path for path in snapshots.iterdir() if path.is_dir()) if snapshots.is_dir() else []
    whole = [path for path in found if weight_files(path) and all(file.is_file() for file in weight_files(path))]
    same = [path.name for path in whole if first_difference(model, path) is None]
    if len(same) == 1:
        return same[0]
    seen = f"{', '.join(same)} have" if same else f"none of {len(whole)} has"
    raise ConfigError(
        f"the base {repo} is a hub repository, and which commit of it is in memory is not known: of the snapshots in "
        f"{snapshots} {seen} its tensors. Say base_revision='...' (the 40 hex digits that were trained on)"
    )


def _compared(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    embedding = plain_module(model.get_input_embeddings()).weight
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is embedding or (parameter.dim() == 1 and parameter.is_floating_point()):
            for part in _WRAPPERS:
                name = name.replace(part, "")
            yield name, parameter
