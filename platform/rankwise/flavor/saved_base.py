"""A copy of the base that `mlflow.transformers` has saved with an adapter, peft's layers in it.

It cannot be loaded as it was, but it tells which base the adapter was trained on.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from rankwise.assets.weights import weight_files
from rankwise.exceptions import BaseMismatchError

# Between the name of a layer that an adapter targets and `weight`: a name that transformers does not know.
_WRAPPED = ".base_layer."


def reinitialised_weights(saved: Path) -> list[str]:
    """Names of the weights in a saved base that transformers fills with random numbers on loading."""
    names: list[str] = []
    for path in weight_files(saved):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names += [name for name in file.keys() if name.endswith(f"{_WRAPPED}weight")]  # noqa: SIM118
    return sorted(name.replace(_WRAPPED, ".") for name in names)


def compare_saved_base(saved: Path, base: Path, source: str) -> int:
    """Compare the copy of a base that was saved with an adapter with the base that it is to be registered over.

    Compared are all tensors that are not quantized, through 16-bit types too: the copy is as it was in memory.

    Args:
        saved: The copy's directory.
        base: The base's directory.
        source: What names the base.

    Returns:
        How many tensors were compared.

    Raises:
        BaseMismatchError: A tensor differs.
        AssetError: A file cannot be read.
    """
    theirs: dict[str, Path] = {}
    for path in weight_files(base):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            theirs.update(dict.fromkeys(file.keys(), path))
    count = 0
    for path in weight_files(saved):
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                plain = name.replace(_WRAPPED, ".")
                if plain not in theirs or not (mine := file.get_tensor(name)).is_floating_point():
                    continue
                with safe_open(str(theirs[plain]), framework="pt", device="cpu") as other:
                    if not _same(mine, other.get_tensor(plain)):
                        raise BaseMismatchError(
                            f"base {source} is not the one that the adapter was trained on: the copy of the base that "
                            f"was saved with it differs in {plain}. Name the base that it was trained on (--base)"
                        )
                count += 1
    return count


def _same(copy: torch.Tensor, stored: torch.Tensor) -> bool:
    rows = min(len(copy), len(stored))  # An embedding may have been resized.
    if copy.shape[1:] != stored.shape[1:]:
        return False
    # It may have been loaded in a narrower type than it was saved in.
    return any(
        torch.equal(stored[:rows].to(loaded).to(copy.dtype), copy[:rows])
        for loaded in (copy.dtype, torch.bfloat16, torch.float16)
    )
