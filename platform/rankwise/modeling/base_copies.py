"""Copies of the base's own weights in an adapter's file.

peft stores the embedding or the head with an adapter that targets it (`save_embedding_layers`), and on loading writes
the copy into the base. A copy that equals the base's weight is left out here; any other one would change the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rankwise.compat.peft import base_name
from rankwise.exceptions import BaseMismatchError

_COPY = ".base_layer.weight"
# peft's own names of the layers that it stores whole if the vocabulary was resized.
_EMBEDDINGS = ("embed_tokens", "lm_head")


def is_base_copy(name: str, modules_to_save: Sequence[str] | None) -> bool:
    """Whether a tensor of a PEFT file is a copy of a base's weight, rather than a part of the adapter."""
    if name.endswith(_COPY):
        return True
    module, _, part = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    return part == "weight" and leaf in _EMBEDDINGS and leaf not in (modules_to_save or ())


def check_base_copies(base: Any, copies: Mapping[str, torch.Tensor], where: str) -> None:
    """Compare copies, by their names in the base, with the weights of a model (with or without adapters).

    Raises:
        BaseMismatchError: A copy differs from the base's weight.
    """
    if not copies:
        return
    weights = {base_name(name): parameter for name, parameter in base.named_parameters(remove_duplicate=False)}
    for name, copied in copies.items():
        weight = weights.get(base_name(name))
        if weight is None:
            raise BaseMismatchError(f"{where} has a copy of {base_name(name)}, which the base does not have")
        if weight.shape != copied.shape or not is_same_weight(copied, weight.detach().to(copied.device)):
            raise BaseMismatchError(
                f"{where} has its own copy of {base_name(name)}, shape {tuple(copied.shape)}, which is not the base's, "
                f"shape {tuple(weight.shape)}: it was trained over another base, or the weight was trained or resized "
                "too. Name the base that it was trained on, or train new token rows with "
                "LoraConfig(trainable_token_indices=...)"
            )


def is_same_weight(copied: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether two weights agree in the rows that both have, also after rounding to 16-bit types."""
    rows = min(len(copied), len(weight))  # An embedding may have been resized.
    if copied.shape[1:] != weight.shape[1:]:
        return False
    # The base may have been loaded in a narrower type than the copy has.
    return any(
        torch.equal(weight[:rows].to(loaded).to(copied.dtype), copied[:rows])
        for loaded in (copied.dtype, torch.bfloat16, torch.float16)
    )
