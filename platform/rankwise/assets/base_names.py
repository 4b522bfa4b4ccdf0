"""Names of a base's linear modules, read from the headers of its weights without torch."""

from __future__ import annotations

from pathlib import Path

from rankwise.assets.weights import tensors

# Modules whose weight has two axes too, but which are no linear layers to adapt: embeddings and the output layer.
NOT_TARGETS = frozenset(
    {
        "embed_tokens",
        "embed_in",
        "embed_out",
        "embed_positions",
        "lm_head",
        "wte",
        "wpe",
        "word_embeddings",
        "tok_embeddings",
        "output",
        "score",
    }
)


def linear_names(path: Path) -> set[str]:
    """The names that `lora.target_modules` may hold for a local base: last parts of its linear modules' names.

    Args:
        path: A directory with safetensors.

    Returns:
        For a Llama: `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`.

    Raises:
        AssetError: A file of the weights is missing or not in the format.
    """
    modules = {
        entry.name.removesuffix(".weight").rpartition(".")[2]
        for entry in tensors(path)
        if entry.name.endswith(".weight") and len(entry.shape) == 2
    }
    return modules - NOT_TARGETS
